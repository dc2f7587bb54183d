// SPDX-License-Identifier: Apache-2.0
//! What the store keeps as JSON is read by later agents: golden files of every kind of document, one folder for each
//! schema version. A change of the stored form shows in their difference, and belongs into a new version
//! (`docs/adr/0015-stored-documents-belong-to-the-schema-version.md`).

mod examples;

use std::{
    collections::BTreeSet,
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
};

use rusqlite::{Connection, params};
use salvor_agent::{
    core::{
        action::Verb,
        image::ImageFormat,
        operation::{GuestStop, OperationState, StepState},
        plan::{Mark, Outcome, Phase, Plan, RescueChange, Step},
        reason::{Reason, WarningName},
        record::{
            Fault, Origin, OverlayDisposition, PasswordDelivery, Protection, RescueBus,
            RescueDevice, RescueMode, ServerRecord,
        },
        state::{ObservationSource, PowerState, TaskState, VmState},
    },
    store::{Change, Store, StoreError},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use examples::{changes, image, operation, plans, server};

fn golden(version: i64) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/documents/v{version}"))
}

/// The schema version that this agent writes.
fn current() -> i64 {
    let folder = tempfile::tempdir().unwrap();
    version_of(&new_store(folder.path()).1)
}

fn version_of(connection: &Connection) -> i64 {
    connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .unwrap()
}

fn new_store(folder: &Path) -> (PathBuf, Connection) {
    let path = folder.join("salvor.db");
    drop(Store::open(&path, 1_000).unwrap());
    let connection = Connection::open(&path).unwrap();
    (path, connection)
}

/// Holds a text against its golden file, which `UPDATE_GOLDEN=1` writes anew.
fn check_text(name: &str, text: &str) {
    let path = golden(current()).join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let diff = similar::TextDiff::from_lines(kept.as_str(), text);
    let diff = diff
        .unified_diff()
        .header("stored before", "now")
        .to_string();
    assert!(
        diff.is_empty(),
        "{name}:\n{diff}\nWhat is stored has changed. If this schema version was released, make a new one \
         (agent/src/store/schema.rs); then UPDATE_GOLDEN=1 accepts it"
    );
}

/// A document is written as its golden file says, and read from there to the same value.
fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    check_text(name, &(serde_json::to_string_pretty(value).unwrap() + "\n"));
    assert_eq!(read::<T>(current(), name), *value, "{name}");
}

fn read<T: DeserializeOwned>(version: i64, name: &str) -> T {
    let text = fs::read_to_string(golden(version).join(name)).unwrap();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The names that serde takes for an enum: its refusal of another one lists them.
fn variants<T: DeserializeOwned + Debug>() -> BTreeSet<String> {
    let refusal = serde_json::from_str::<T>("\"?\"").unwrap_err().to_string();
    let listed: BTreeSet<String> = refusal
        .split('`')
        .skip(3)
        .step_by(2)
        .map(str::to_owned)
        .collect();
    assert!(listed.len() > 1, "{refusal}");
    listed
}

/// Every string, and every key of an object, anywhere in a document.
fn words(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::String(word) => {
            into.insert(word.clone());
        }
        Value::Array(values) => values.iter().for_each(|value| words(value, into)),
        Value::Object(fields) => {
            for (key, value) in fields {
                into.insert(key.clone());
                words(value, into);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[test]
fn documents_are_stored_as_they_were_and_read_to_the_same_value() {
    check("server.json", &server());
    check("operation.json", &operation());
    check("image.json", &image());
    for (name, plan) in plans() {
        check(&format!("plan-{name}.json"), &plan);
    }
    for (name, change) in changes() {
        check(&format!("event-{name}.json"), &change);
    }
}

#[test]
fn the_golden_files_have_every_kind_of_step_outcome_and_change() {
    let mut found = BTreeSet::new();
    for (_, plan) in plans() {
        words(&serde_json::to_value(&plan).unwrap(), &mut found);
    }
    for (_, change) in changes() {
        words(&serde_json::to_value(&change).unwrap(), &mut found);
    }
    let kinds = [
        variants::<Step>(),
        variants::<Mark>(),
        variants::<Outcome>(),
        variants::<RescueChange>(),
        variants::<Change>(),
        variants::<Phase>(),
    ];
    for kind in kinds.iter().flatten() {
        assert!(found.contains(kind), "{kind} is in no golden file");
    }
}

#[test]
fn nothing_in_the_golden_files_is_left_out() {
    fn look(name: &str, value: &Value) {
        match value {
            Value::Null => panic!("{name} has a null: every field is to be set"),
            Value::Array(values) => {
                assert!(!values.is_empty(), "{name} has an empty list");
                values.iter().for_each(|value| look(name, value));
            }
            Value::Object(fields) => {
                assert!(!fields.is_empty(), "{name} has an empty map");
                fields.values().for_each(|value| look(name, value));
            }
            Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    for name in [
        "server.json",
        "operation.json",
        "image.json",
        "plan-every-step.json",
    ] {
        look(name, &read(current(), name));
    }
}

#[test]
fn the_words_for_states_are_the_stored_ones() {
    fn line<T: Serialize>(name: &str, all: &[T]) -> String {
        all.iter()
            .map(|word| format!("{name}: {}\n", serde_json::to_value(word).unwrap()))
            .collect()
    }
    let text = [
        line("verb", Verb::ALL),
        line("vm state", VmState::ALL),
        line("task state", TaskState::ALL),
        line("power state", PowerState::ALL),
        line("observation source", ObservationSource::ALL),
        line("origin", Origin::ALL),
        line("rescue mode", RescueMode::ALL),
        line("rescue bus", RescueBus::ALL),
        line("rescue device", RescueDevice::ALL),
        line("protection", Protection::ALL),
        line("overlay disposition", OverlayDisposition::ALL),
        line("password delivery", PasswordDelivery::ALL),
        line("operation state", OperationState::ALL),
        line("step state", StepState::ALL),
        line("guest stop", GuestStop::ALL),
        line("phase", Phase::ALL),
        line("image format", ImageFormat::ALL),
        line("reason", Reason::ALL),
        line("warning", WarningName::ALL),
    ];
    check_text("words.txt", &text.concat());
}

#[test]
fn the_tables_are_those_of_the_schema_version() {
    let folder = tempfile::tempdir().unwrap();
    let (_, connection) = new_store(folder.path());
    let mut statement = connection
        .prepare("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name")
        .unwrap();
    let tables: Vec<String> = statement
        .query_map([], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    check_text("tables.sql", &(tables.join(";\n\n") + ";\n"));
}

/// A store as the agent of a schema version left it, with its golden documents.
fn stored(folder: &Path, version: i64) -> (PathBuf, Connection) {
    let text = |name: &str| fs::read_to_string(golden(version).join(name)).unwrap();
    let path = folder.join("salvor.db");
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch(&text("tables.sql")).unwrap();
    connection
        .pragma_update(None, "user_version", version)
        .unwrap();
    let (server, image, operation) = (server(), image(), operation());
    let plan = read::<Plan>(version, "plan-every-step.json");
    connection
        .execute(
            "INSERT INTO servers (id, doc) VALUES (?1, ?2)",
            params![server.id.to_string(), text("server.json")],
        )
        .unwrap();
    connection
        .execute(
            "INSERT INTO images (id, name, doc) VALUES (?1, ?2, ?3)",
            params![image.id.to_string(), image.name, text("image.json")],
        )
        .unwrap();
    connection
        .execute(
            "INSERT INTO operations (id, server, request_id, body_hash, final, created_at, plan, doc)
             VALUES (?1, ?2, ?3, 'hash', 0, 1, ?4, ?5)",
            params![
                operation.id.to_string(),
                plan.server.to_string(),
                operation.request_id,
                text("plan-every-step.json"),
                text("operation.json")
            ],
        )
        .unwrap();
    for (name, _) in changes() {
        connection
            .execute(
                "INSERT INTO events (at, server, doc) VALUES (1, ?1, ?2)",
                params![server.id.to_string(), text(&format!("event-{name}.json"))],
            )
            .unwrap();
    }
    connection
        .execute(
            "INSERT INTO saved_definitions (server, plan, xml) VALUES (?1, ?2, '<domain/>')",
            [server.id.to_string(), operation.id.to_string()],
        )
        .unwrap();
    connection
        .execute(
            "INSERT INTO image_holders (image, holder) VALUES (?1, 'servers/x')",
            [image.id.to_string()],
        )
        .unwrap();
    (path, connection)
}

#[tokio::test]
async fn a_store_of_every_schema_version_is_read() {
    for version in 1..=current() {
        let folder = tempfile::tempdir().unwrap();
        let (path, _) = stored(folder.path(), version);
        let store = Store::open(&path, 1_000).unwrap();
        // That today's are read to the same values is another test: these may lack fields.
        assert_eq!(store.server(server().id).unwrap().id, server().id);
        let images = store.images().await.unwrap();
        assert_eq!((images[0].0.id, images[0].1), (image().id, 1));
        let operations = store.operations(None, i64::MAX, 10).await.unwrap();
        assert_eq!(operations[0].1.id, operation().id);
        let under_way = store.under_way().await.unwrap();
        assert_eq!(under_way[0].1.steps.len(), plans()[0].1.steps.len());
        let events = store.events_after(0, 100).await.unwrap().events;
        assert_eq!(events.len(), changes().len());
        for (name, _) in plans() {
            read::<Plan>(version, &format!("plan-{name}.json"));
        }
    }
}

fn with_unknown_fields<T>(value: &T, objects: &[&str]) -> T
where
    T: Serialize + DeserializeOwned,
{
    let mut document = serde_json::to_value(value).unwrap();
    for object in objects {
        let fields = document.pointer_mut(object).and_then(Value::as_object_mut);
        fields
            .unwrap_or_else(|| panic!("{object} is no object"))
            .insert("a_field_that_is_gone".to_owned(), Value::from(1));
    }
    serde_json::from_value(document).unwrap()
}

#[test]
fn fields_that_are_gone_are_passed_over() {
    let objects = [
        "",
        "/power",
        "/flavor",
        "/disks/0",
        "/nics/0",
        "/rescue",
        "/rescue/disks/0",
        "/rescue/overlays/0",
        "/fault",
    ];
    assert_eq!(with_unknown_fields(&server(), &objects), server());
    let objects = ["", "/steps/0", "/error", "/warnings/0"];
    assert_eq!(with_unknown_fields(&operation(), &objects), operation());
    assert_eq!(with_unknown_fields(&image(), &[""]), image());
    let plan = plans()[0].1.clone();
    let objects = [
        "",
        "/initial",
        "/steps/0",
        "/steps/0/step/HoldImage",
        "/outcome/Change",
    ];
    assert_eq!(with_unknown_fields(&plan, &objects), plan);
}

fn without<T: Serialize + DeserializeOwned>(value: &T, object: &str, field: &str) -> T {
    let mut document = serde_json::to_value(value).unwrap();
    let fields = document.pointer_mut(object).and_then(Value::as_object_mut);
    assert!(
        fields.unwrap().remove(field).is_some(),
        "there is no {field}"
    );
    serde_json::from_value(document).unwrap()
}

#[test]
fn fields_that_came_later_mean_what_was_so_before() {
    let expected = ServerRecord {
        public_keys: [].into(),
        ..server()
    };
    assert_eq!(without(&server(), "", "public_keys"), expected);
    let expected = ServerRecord {
        fault: server().fault.map(|fault| Fault {
            revert_step: String::new(),
            ..fault
        }),
        ..server()
    };
    assert_eq!(without(&server(), "/fault", "revert_step"), expected);
    // Servers of agents without the property are brought back after a reboot of the host.
    assert!(without(&server(), "", "autostart").autostart);
    for field in [
        "owner",
        "lock",
        "description",
        "tags",
        "access_ipv4",
        "access_ipv6",
        "shutdown_timeout_ms",
        "autostart_order",
        "deletion",
    ] {
        without(&server(), "", field);
    }
    for field in ["user", "project", "host"] {
        without(&operation(), "", field);
    }
    let start = Step::StartDomain {
        mark: Mark::Own,
        fresh: true,
    };
    let expected = Step::StartDomain {
        mark: Mark::Own,
        fresh: false,
    };
    assert_eq!(without(&start, "/StartDomain", "fresh"), expected);
}

/// What a read says of a damaged row: where it is and what to do.
fn says(error: &StoreError, place: &str) {
    let text = error.to_string();
    assert!(matches!(error, StoreError::Damaged { .. }), "{text}");
    for part in [
        place,
        "salvor.db",
        "put salvor.db back from a backup",
        "do not delete the row",
    ] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    assert!(std::error::Error::source(error).is_some());
}

#[tokio::test]
async fn a_damaged_row_is_named_with_its_table_and_what_to_do() {
    let (server, operation, image) = (server().id, operation().id, image().id);
    let damaged = |change: &str| {
        let folder = tempfile::tempdir().unwrap();
        let (path, connection) = stored(folder.path(), current());
        assert!(connection.execute(change, []).unwrap() > 0, "{change}");
        (folder, Store::open(&path, 1_000))
    };

    // Half a document, and a whole one that says something else.
    for doc in ["'{\"id\":'", "'{}'", "''"] {
        let (_folder, store) = damaged(&format!("UPDATE servers SET doc = {doc}"));
        let place = format!("doc of {server} in the table servers");
        says(&store.unwrap_err(), &place);
    }

    let (_folder, store) = damaged("UPDATE operations SET doc = 'x'");
    let store = store.unwrap();
    let place = format!("doc of {operation} in the table operations");
    says(&store.operation(operation).await.unwrap_err(), &place);
    says(
        &store.operations(None, i64::MAX, 1).await.unwrap_err(),
        &place,
    );
    says(&store.under_way().await.unwrap_err(), &place);

    let (_folder, store) = damaged("UPDATE operations SET plan = '{}'");
    let store = store.unwrap();
    let place = format!("plan of {operation} in the table operations");
    says(&store.under_way().await.unwrap_err(), &place);
    assert!(store.operation(operation).await.unwrap().is_some());

    let (_folder, store) = damaged("UPDATE images SET doc = '[]'");
    let store = store.unwrap();
    let place = format!("doc of {image} in the table images");
    says(&store.images().await.unwrap_err(), &place);
    says(&store.image(image).await.unwrap_err(), &place);

    let (_folder, store) = damaged("UPDATE events SET doc = '\"Removed\"' WHERE revision = 2");
    let store = store.unwrap();
    let place = "doc of 2 in the table events";
    says(&store.events_after(1, 1).await.unwrap_err(), place);
    assert_eq!(store.events_after(0, 1).await.unwrap().events.len(), 1);

    let (_folder, store) = damaged("UPDATE saved_definitions SET plan = 'x'");
    let place = format!("plan of {server} in the table saved_definitions");
    says(
        &store.unwrap().saved_definitions().await.unwrap_err(),
        &place,
    );
}
