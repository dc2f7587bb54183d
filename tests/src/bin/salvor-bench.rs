// SPDX-License-Identifier: Apache-2.0
//! `make bench`; see `salvor_tests::bench`.

use std::process::ExitCode;

use salvor_tests::bench::{Settings, run};

const USAGE: &str = "usage: salvor-bench [--quick] [--lives N] [--seed N] [--keep]";

fn main() -> ExitCode {
    match settings(std::env::args().skip(1)) {
        Some(settings) => {
            run(settings);
            ExitCode::SUCCESS
        }
        None => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn settings(mut arguments: impl Iterator<Item = String>) -> Option<Settings> {
    let mut settings = Settings::full(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => settings = Settings::quick(settings.seed),
            "--lives" => settings.lives = arguments.next()?.parse().ok()?,
            "--seed" => settings.seed = arguments.next()?.parse().ok()?,
            "--keep" => settings.keep = true,
            _ => return None,
        }
    }
    Some(settings)
}
