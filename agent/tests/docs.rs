// SPDX-License-Identifier: Apache-2.0
//! What the documents say is what the code does: tables that are made from the code, and the test that they
//! are up to date. `UPDATE_DOCS=1 cargo test -p salvor-agent --test docs` makes them anew.
//!
//! A table in a page that is otherwise written by hand stands between `<!-- table: NAME -->` and
//! `<!-- end of table -->`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::PathBuf};

use salvor_agent::core::{
    action::{Shutdown, Verb},
    admission::{Allowed, allowed},
    operation::{OperationState, StepState},
    password::CryptHash,
    plan::{ConfigDriveSpec, Mark, Step},
    state::{PowerState, Status, TaskState, VmState, status},
};
use uuid::Uuid;

const END: &str = "<!-- end of table -->";

/// Holds a page against what it should be, or writes it.
fn hold(page: &str, wanted: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .join("docs")
        .join(page);
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, wanted).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "docs/{page} is stale: run UPDATE_DOCS=1 cargo test -p salvor-agent --test docs"
    );
}

/// Holds the tables of a page against what they should be, or writes them. Each must be there.
fn hold_tables(page: &str, tables: &[(&str, String)]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(page);
    let mut text = fs::read_to_string(path).unwrap();
    for (name, table) in tables {
        let begin = format!("<!-- table: {name} -->\n");
        let from = text
            .find(&begin)
            .unwrap_or_else(|| panic!("docs/{page} has no {begin}"))
            + begin.len();
        let to = from
            + text[from..]
                .find(END)
                .unwrap_or_else(|| panic!("docs/{page}: the table {name} has no end"));
        text.replace_range(from..to, table);
    }
    hold(page, &text);
}

fn row(text: &mut String, cells: &[String]) {
    writeln!(text, "| {} |", cells.join(" | ")).unwrap();
}

fn head(cells: &[&str]) -> String {
    let mut text = String::new();
    row(
        &mut text,
        &cells
            .iter()
            .map(|cell| (*cell).to_owned())
            .collect::<Vec<_>>(),
    );
    writeln!(text, "|{}", "---|".repeat(cells.len())).unwrap();
    text
}

fn code(text: impl std::fmt::Display) -> String {
    format!("`{text}`")
}

#[test]
fn the_tables_of_states_are_those_of_the_code() {
    hold_tables(
        "STATES.md",
        &[
            ("status", statuses()),
            ("admission", admission()),
            ("task states", tasks()),
            ("power states", powers()),
        ],
    );
}

fn statuses() -> String {
    let mut table = head(&["vm state", "status", "except while the task state is"]);
    for vm_state in VmState::ALL {
        let usual = status(*vm_state, None);
        let mut others: BTreeMap<Status, Vec<String>> = BTreeMap::new();
        for task in TaskState::ALL {
            let status = status(*vm_state, Some(*task));
            if status != usual {
                others.entry(status).or_default().push(code(task));
            }
        }
        let others: Vec<_> = others
            .into_iter()
            .map(|(status, tasks)| format!("{} → {status}", tasks.join(", ")))
            .collect();
        row(
            &mut table,
            &[code(vm_state), usual.to_string(), others.join("; ")],
        );
    }
    table
}

/// The table that the test of admission holds the code against: what it marks (`*`) Nova does not do so.
const MARKED: &str = include_str!("core/admission.txt");

/// What is marked of a verb, as words in the order of its columns.
fn marked(verb: Verb) -> [Vec<&'static str>; 3] {
    let mut words = Vec::new();
    let mut ours = false;
    for word in MARKED.split_whitespace() {
        match word.strip_suffix(':') {
            Some(name) => ours = name == verb.name(),
            None if ours => words.push(word),
            None => {}
        }
    }
    let mut columns = words.split(|word| *word == "|").map(|column| {
        let marked = column.iter().filter_map(|word| word.strip_suffix('*'));
        // The condition before a state has a column of its own in the docs.
        let marked = marked.map(|word| word.rsplit(':').next().unwrap());
        marked.collect()
    });
    std::array::from_fn(|_| columns.next().unwrap())
}

fn starred(text: String, marked: bool) -> String {
    if marked { text + r"\*" } else { text }
}

fn admission() -> String {
    let mut table = head(&[
        "verb",
        "yes",
        "if rescued",
        "unless rescued",
        "if its CPUs are stopped",
        "a lock stops",
        "who may ask",
    ]);
    for verb in Verb::ALL {
        let [marked_states, _, access] = marked(*verb);
        let states = |answer: Allowed| {
            let states = VmState::ALL
                .iter()
                .filter(|state| allowed(*verb, **state) == answer);
            let states =
                states.map(|state| starred(code(state), marked_states.contains(&state.name())));
            states.collect::<Vec<_>>().join(", ")
        };
        row(
            &mut table,
            &[
                code(verb),
                states(Allowed::Yes),
                states(Allowed::IfRescued),
                states(Allowed::UnlessRescued),
                states(Allowed::IfPaused),
                if verb.respects_lock() {
                    starred("members".to_owned(), !access.is_empty())
                } else {
                    String::new()
                },
                starred(
                    match verb {
                        Verb::DeliverPassword | Verb::StartRescue => "the agent",
                        verb if verb.is_for_admin() => "administrator",
                        _ => "members",
                    }
                    .to_owned(),
                    !access.is_empty() && !verb.respects_lock(),
                ),
            ],
        );
    }
    table
}

fn tasks() -> String {
    let mut table = head(&["verb", "task state while it runs", "overtakes"]);
    for verb in Verb::ALL {
        let [_, marked, _] = marked(*verb);
        let all = marked.contains(&"all-but");
        let overtaken: Vec<_> = Verb::ALL
            .iter()
            .filter(|other| verb.overtakes(**other))
            .map(|other| starred(code(other), all || marked.contains(&other.name())))
            .collect();
        row(
            &mut table,
            &[
                code(verb),
                verb.task_state().map(code).unwrap_or_default(),
                if verb.needs_lane() {
                    overtaken.join(", ")
                } else {
                    "nothing: it goes through beside what is under way".to_owned()
                },
            ],
        );
    }
    table
}

fn powers() -> String {
    let mut table = head(&["power state", "Nova's number", "is there a QEMU process"]);
    for power in PowerState::ALL {
        let on = match power {
            PowerState::Unknown => "not known",
            power if power.is_on() => "yes",
            _ => "no",
        };
        row(
            &mut table,
            &[code(power), novas_number(*power).to_string(), on.to_owned()],
        );
    }
    table
}

/// Nova's number for the state (`nova/compute/power_state.py`); it has none for unknown, which a Nova-compatible
/// front shows as 0, `NOSTATE`.
fn novas_number(power: PowerState) -> u8 {
    match power {
        PowerState::NoState | PowerState::Unknown => 0,
        PowerState::Running => 1,
        PowerState::Paused => 3,
        PowerState::Shutdown => 4,
        PowerState::Crashed => 6,
        PowerState::Suspended => 7,
    }
}

#[test]
fn the_deadlines_are_those_of_the_code() {
    let mut table = head(&["step", "what it does", "at most"]);
    for step in steps() {
        let limit = match &step {
            Step::PowerOff { .. } => format!(
                "the shutdown time-out and {}",
                time(step.deadline_ms() - EXAMPLE.timeout_ms)
            ),
            Step::HoldImage { .. } => format!(
                "{}, and 1 s for every 10 MB, which are read if the file was touched",
                time(step.deadline_ms())
            ),
            Step::SaveMemory { .. } | Step::RestoreMemory { .. } | Step::DumpMemory { .. } => {
                format!(
                    "{}, and 1 s for every 10 MB of the guest's memory",
                    time(step.deadline_ms())
                )
            }
            step => time(step.deadline_ms()),
        };
        row(
            &mut table,
            &[code(step.kind()), about(&step).to_owned(), limit],
        );
    }
    let mut states = String::new();
    for state in OperationState::ALL {
        let end = if state.is_final() { " (an end)" } else { "" };
        writeln!(states, "* operation: `{state}`{end}").unwrap();
    }
    for state in StepState::ALL {
        writeln!(states, "* step: `{state}`").unwrap();
    }
    hold_tables(
        "SPECIFICATION.md",
        &[("deadlines", table), ("states of operations", states)],
    );
}

fn time(milliseconds: u64) -> String {
    match milliseconds / 1000 {
        seconds if seconds % 3600 == 0 => format!("{} h", seconds / 3600),
        seconds if seconds >= 120 && seconds % 60 == 0 => format!("{} min", seconds / 60),
        seconds => format!("{seconds} s"),
    }
}

const EXAMPLE: Shutdown = Shutdown {
    timeout_ms: 60_000,
    retry_ms: 10_000,
};

/// What a step does, in general. A new kind of step does not compile until it is here; add it to [`steps`], too.
fn about(step: &Step) -> &'static str {
    match step {
        Step::HoldImage { .. } => {
            "checks that an image is as it was imported, and keeps it from being deleted"
        }
        Step::MakeFolder { .. } => "makes a folder",
        Step::CreateOverlay { .. } => "makes a qcow2 overlay on an image or a disk",
        Step::CopyFile { .. } => "copies a file (UEFI variables)",
        Step::BuildConfigDrive { .. } => "makes a config drive",
        Step::SaveDefinition { .. } => "saves the server's definition, once",
        Step::PowerOff { .. } => "has the guest shut down, and ends it when its time is over",
        Step::ReserveNote { .. } => "makes room for a note of the disks' owners",
        Step::NoteOwners { .. } => "notes to whom protected disks belong",
        Step::PutOwnersBack { .. } => "gives protected disks back to their owners",
        Step::MarkCommitStarted => "notes that overlays are being committed",
        Step::CommitOverlay { .. } => "writes an overlay to the disk under it",
        Step::EmptyOverlay { .. } => "empties an overlay whose disk is about to change under it",
        Step::DefineDomain { .. } => "defines the domain",
        Step::UndefineDomain { .. } => "removes the domain's definition",
        Step::DropSavedMemory => "removes memory that was saved of the rescue (a managed save)",
        Step::StartDomain { .. } => "starts the guest",
        Step::SetUserPassword { .. } => "has the guest agent set a password",
        Step::RemoveFolder { .. } => "removes a folder of the server",
        Step::ReleaseImage { .. } => "lets go of an image",
        Step::DropSavedDefinition => "forgets the saved definition",
        Step::Pause { .. } => "stops the guest's CPUs",
        Step::Unpause => "lets the guest's CPUs run",
        Step::SaveMemory { .. } => "saves the guest's memory and ends it (a managed save)",
        Step::RestoreMemory { .. } => "starts the guest from its saved memory",
        Step::SetGuestTime => "has the guest agent set the guest's clock",
        Step::InjectNmi => "injects an NMI",
        Step::DumpMemory { .. } => "writes the guest's memory to a file",
        Step::KnowDefinition { .. } => "notes a definition as the server's own",
    }
}

/// One step of each kind.
fn steps() -> Vec<Step> {
    let text = String::new;
    vec![
        Step::HoldImage {
            image: Uuid::nil(),
            path: text(),
            size: 0,
            holder: text(),
        },
        Step::MakeFolder { path: text() },
        Step::CreateOverlay {
            path: text(),
            backing: text(),
            backing_format: text(),
            backing_references: Default::default(),
            size: 0,
        },
        Step::CopyFile {
            from: text(),
            to: text(),
        },
        Step::BuildConfigDrive {
            path: text(),
            drive: Box::new(ConfigDriveSpec {
                instance_id: Uuid::nil(),
                hostname: text(),
                name: text(),
                public_keys: BTreeMap::new(),
                password: None,
                password_user: text(),
                user_data: None,
                metadata: BTreeMap::new(),
            }),
        },
        Step::SaveDefinition { xml: text() },
        Step::power_off(EXAMPLE, true),
        Step::ReserveNote {
            disks: Vec::new(),
            note: text(),
        },
        Step::NoteOwners {
            disks: Vec::new(),
            note: text(),
        },
        Step::PutOwnersBack { note: text() },
        Step::MarkCommitStarted,
        Step::CommitOverlay {
            path: text(),
            base: text(),
            base_format: String::new(),
            base_references: Default::default(),
        },
        Step::EmptyOverlay {
            path: text(),
            base: text(),
            base_format: String::new(),
        },
        Step::DefineDomain {
            xml: text(),
            mark: Mark::Own,
            before: None,
        },
        Step::UndefineDomain {
            before: text(),
            tpm_goes: true,
        },
        Step::DropSavedMemory,
        Step::StartDomain {
            mark: Mark::Own,
            fresh: false,
        },
        Step::SetUserPassword {
            user: text(),
            hash: CryptHash(text()),
        },
        Step::RemoveFolder { path: text() },
        Step::ReleaseImage {
            image: Uuid::nil(),
            holder: text(),
        },
        Step::DropSavedDefinition,
        Step::Pause { was_running: true },
        Step::Unpause,
        Step::SaveMemory {
            file: String::new(),
            memory_kib: 0,
        },
        Step::RestoreMemory { memory_kib: 0 },
        Step::SetGuestTime,
        Step::InjectNmi,
        Step::DumpMemory {
            path: text(),
            memory_kib: 0,
        },
        Step::KnowDefinition { xml: text() },
    ]
}
