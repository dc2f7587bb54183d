// SPDX-License-Identifier: Apache-2.0
//! `docs/REASONS.md` is what the table in the code says. `UPDATE_DOCS=1` writes it anew.

use std::{fmt::Write as _, path::Path};

use salvor_agent::{
    api::DOMAIN,
    core::reason::{Code, Reason, WarningName},
};

fn page() -> String {
    let mut page = format!(
        "# Reasons and warnings\n\n\
         <!-- Made from agent/src/core/reason.rs by the test `the_page_of_reasons_is_up_to_date`. -->\n\n\
         Every error of the API carries a `google.rpc.ErrorInfo` with the domain `{DOMAIN}` and one of these\n\
         reasons. `Operation.error`, `Fault.reason` and `Refusal.reason` use the same ones. `HTTP` is the status\n\
         that a Nova-compatible front answers (also in `ErrorInfo.metadata[\"http\"]`). *Retry* means that the very\n\
         same call may be made again after the time in `RetryInfo`; with a `request_id` it cannot act twice.\n\n\
         An image that ImageService itself is asked for and does not have is NOT_FOUND; the code below is that of\n\
         an image that an action names.\n\n\
         | Reason | gRPC code | HTTP | Retry | Meaning |\n|---|---|---|---|---|\n"
    );
    for reason in Reason::ALL {
        let (code, http, meaning) = (reason.code(), reason.http(), reason.explanation());
        // That these and no others carry RetryInfo is a test of `api::errors`.
        let retry = match code {
            Code::Unavailable | Code::Aborted => "yes",
            _ => "no",
        };
        writeln!(
            page,
            "| `{reason}` | {} | {http} | {retry} | {meaning} |",
            code.name()
        )
        .unwrap();
    }
    page.push_str(
        "\n## Warnings\n\nA warning is worth knowing but no reason to refuse. Its name is in `Warning.name`.\n\n\
         | Warning | Meaning |\n|---|---|\n",
    );
    for warning in WarningName::ALL {
        writeln!(page, "| `{warning}` | {} |", warning.explanation()).unwrap();
    }
    page
}

#[test]
fn the_page_of_reasons_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/REASONS.md");
    let page = page();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &page).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == page,
        "docs/REASONS.md is out of date: run the tests with UPDATE_DOCS=1"
    );
}
