// SPDX-License-Identifier: Apache-2.0
//! Running the programs that make images.

use std::ffi::{OsStr, OsString};
use std::process::Command;

/// Runs `program` with `arguments` and returns what it printed. Panics with its error output if it fails.
#[track_caller]
pub fn run<I>(program: &str, arguments: I) -> String
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    let arguments: Vec<OsString> = arguments
        .into_iter()
        .map(|argument| argument.as_ref().to_owned())
        .collect();
    let output = Command::new(program)
        .args(&arguments)
        .env("MTOOLS_SKIP_CHECK", "1")
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program}: {e}; run tools/setup"));
    assert!(
        output.status.success(),
        "{program} {arguments:?} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same, with the arguments given as a mix of texts and paths.
#[macro_export]
macro_rules! tool {
    ($program:expr $(, $argument:expr)* $(,)?) => {
        $crate::guests::run($program, [$(std::ffi::OsStr::new(&$argument).to_owned()),*])
    };
}
