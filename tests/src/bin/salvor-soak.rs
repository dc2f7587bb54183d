// SPDX-License-Identifier: Apache-2.0
//! `make soak`; see `salvor_tests::soak`.

use std::process::ExitCode;
use std::time::Duration;

use rand::Rng as _;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::soak::{Settings, run};

const USAGE: &str = "usage: salvor-soak [--minutes N] [--seed N] [--keep]";

fn main() -> ExitCode {
    let Some(settings) = settings(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let mut folder = RunFolder::named("soak");
    let outcome = run(&settings, &mut folder);
    println!("\n{}", outcome.report);
    for defect in &outcome.defects {
        println!("DEFECT: {defect}");
    }
    println!("{} defects", outcome.defects.len());
    if outcome.defects.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn settings(mut arguments: impl Iterator<Item = String>) -> Option<Settings> {
    let mut settings = Settings {
        seed: rand::rng().random::<u32>().into(),
        length: Duration::from_secs(30 * 60),
        keep: false,
    };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--minutes" => {
                let minutes: u64 = arguments.next()?.parse().ok()?;
                settings.length = Duration::from_secs(60 * minutes);
            }
            "--seed" => settings.seed = arguments.next()?.parse().ok()?,
            "--keep" => settings.keep = true,
            _ => return None,
        }
    }
    Some(settings)
}
