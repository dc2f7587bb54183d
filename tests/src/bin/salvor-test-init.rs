// SPDX-License-Identifier: Apache-2.0
//! The first process of a test host; see `salvor_tests::init`.

use std::process::ExitCode;

fn main() -> ExitCode {
    salvor_tests::init::main()
}
