// SPDX-License-Identifier: Apache-2.0
//! Three minutes of what `make soak` does for thirty.

use std::time::Duration;

use rand::Rng as _;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::soak::{Settings, run};

#[test]
fn random_verbs_and_kills_leave_nothing_stuck_lost_or_leaked_and_the_record_true() {
    let settings = Settings {
        seed: rand::rng().random::<u32>().into(),
        length: Duration::from_secs(3 * 60),
        keep: false,
    };
    let outcome = run(&settings, &mut RunFolder::for_this_test());
    println!("{}", outcome.report);
    assert!(outcome.defects.is_empty(), "{:#?}", outcome.defects);
}
