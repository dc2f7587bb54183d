// SPDX-License-Identifier: Apache-2.0
//! What lies in `deploy/` fits the agent that it is for.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use salvor_tests::agent::salvord;
use salvor_tests::run_folder::{RunFolder, repository};

fn check_config(file: &Path) -> Output {
    Command::new(salvord())
        .args(["check-config", "--config"])
        .arg(file)
        .output()
        .unwrap()
}

/// The sample with every setting that it only shows put into effect.
fn uncommented_sample() -> String {
    let sample = fs::read_to_string(repository().join("deploy/salvor.toml")).unwrap();
    let is_setting = |line: &str| {
        line.split_once(" = ")
            .is_some_and(|(key, _)| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'))
    };
    sample
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(setting) if is_setting(setting) => format!("{setting}\n"),
            _ => format!("{line}\n"),
        })
        .collect()
}

#[test]
fn the_sample_configuration_changes_nothing() {
    let with_sample = check_config(&repository().join("deploy/salvor.toml"));
    assert!(with_sample.status.success(), "{with_sample:?}");
    let effective = String::from_utf8(with_sample.stdout).unwrap();
    assert!(effective.contains("# default"), "{effective}");
    assert!(
        !effective.contains("salvor.toml"),
        "a setting is in effect:\n{effective}"
    );
}

#[test]
fn every_setting_that_the_sample_configuration_shows_exists() {
    let folder = RunFolder::for_this_test();
    let file = folder.join("salvor.toml");
    let uncommented = uncommented_sample();
    assert!(
        uncommented
            .lines()
            .filter(|line| line.contains(" = "))
            .count()
            > 10,
        "{uncommented}"
    );
    fs::write(&file, &uncommented).unwrap();
    let checked = check_config(&file);
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );

    fs::write(
        &file,
        uncommented.replace("retry_interval", "retry_intervall"),
    )
    .unwrap();
    assert_eq!(
        check_config(&file).status.code(),
        Some(78),
        "a misspelt key is refused"
    );
}
