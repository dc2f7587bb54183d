// SPDX-License-Identifier: Apache-2.0
//! Images: imports that are sent, imports on the host, lists.

use std::os::unix::fs::FileExt as _;

use salvor_proto::v1::{self, ImageFormat};
use tonic::Code;
use tonic_types::ErrorDetails;

use crate::{
    made::{ID, at},
    mock::{Mock, State},
    run::{Running, run},
};

#[tokio::test]
async fn a_file_arrives_as_it_is_with_its_properties() {
    let mock = Mock::new(State::default());
    let file = mock.folder().join("fix.qcow2");
    let content: Vec<u8> = (0..3_000_001_u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(&file, &content).unwrap();
    let file = file.to_str().unwrap();
    let arguments = [
        "image",
        "import",
        file,
        "--name",
        "fixer",
        "--property",
        "hw_rescue_bus=usb",
        "--format",
        "qcow2",
        "--sha256",
        "ab",
        "--id",
        ID,
    ];
    let ended = run(&mock.socket(), &arguments).await.with(0);
    assert!(ended.out.contains("name:       fixer\n"), "{}", ended.out);
    let (spec, bytes) = &mock.state().imports[0];
    assert!(*bytes == content, "the content changed on its way");
    assert_eq!((spec.id.as_str(), spec.sha256.as_str()), (ID, "ab"));
    assert_eq!(spec.format(), ImageFormat::Qcow2);
    assert_eq!(spec.properties["hw_rescue_bus"], "usb");

    run(&mock.socket(), &["image", "import", file, "-q"])
        .await
        .with(0);
    assert_eq!(mock.state().imports[1].0.name, "fix");
}

#[tokio::test]
async fn an_empty_file_is_for_the_agent_to_judge() {
    let mock = Mock::new(State::default());
    let file = mock.folder().join("empty.raw");
    std::fs::write(&file, "").unwrap();
    run(&mock.socket(), &["image", "import", file.to_str().unwrap()])
        .await
        .with(0);
    assert!(mock.state().imports[0].1.is_empty());
}

#[tokio::test]
async fn a_file_that_shrinks_while_it_is_sent_never_looks_complete() {
    let mock = Mock::new(State::default());
    let path = mock.folder().join("shrinks.raw");
    let file = std::fs::File::create(&path).unwrap();
    // Too large to be sent before it is cut.
    file.set_len(1 << 38).unwrap();
    let run = Running::start(&mock.socket(), &["image", "import", path.to_str().unwrap()]);
    mock.until(|state| state.import_begun).await;
    file.set_len(1).unwrap();
    let ended = run.end().await.with(1);
    assert!(
        ended.err.contains("it changed while it was read"),
        "{}",
        ended.err
    );
    let state = mock.until(|state| state.broken_imports == 1).await;
    assert!(state.imports.is_empty());
}

#[tokio::test]
async fn an_import_that_takes_too_long_is_given_up() {
    let mock = Mock::new(State {
        hang: true,
        ..Default::default()
    });
    let file = mock.folder().join("slow.raw");
    std::fs::write(&file, "x").unwrap();
    let arguments = [
        "image",
        "import",
        file.to_str().unwrap(),
        "--wait-timeout",
        "200ms",
    ];
    let ended = run(&mock.socket(), &arguments).await.with(1);
    assert!(ended.err.contains("given up after 0.20 s"), "{}", ended.err);
}

#[tokio::test]
async fn a_refused_import_ends_at_once_however_large_the_file() {
    let details = ErrorDetails::with_bad_request_violation("spec.name", "must not be empty");
    let refusal = Some((Code::InvalidArgument, "no".to_owned(), details));
    let mock = Mock::new(State {
        refusal,
        ..Default::default()
    });
    let path = mock.folder().join("large.raw");
    let file = std::fs::File::create(&path).unwrap();
    // Far more than could be sent in the time that a test may take.
    file.set_len(1 << 42).unwrap();
    file.write_at(b"x", 0).unwrap();
    let ended = run(&mock.socket(), &["image", "import", path.to_str().unwrap()])
        .await
        .with(2);
    assert!(
        ended.err.contains("field spec.name: must not be empty"),
        "{}",
        ended.err
    );
}

#[tokio::test]
async fn what_is_no_file_is_told_before_the_agent_is_asked() {
    let mock = Mock::new(State::default());
    let ended = run(&mock.socket(), &["image", "import", "/nowhere/x"])
        .await
        .with(1);
    assert!(
        ended.err.starts_with("salvor: cannot read /nowhere/x: "),
        "{}",
        ended.err
    );
    run(&mock.socket(), &["image", "import", "/"]).await.with(2);
    assert!(mock.state().calls.is_empty());
}

#[tokio::test]
async fn an_import_on_the_host_is_read_by_the_agent() {
    let mock = Mock::new(State::default());
    let arguments = [
        "image",
        "import",
        "/srv/on-host.iso",
        "--on-host",
        "-o",
        "json",
    ];
    let json = run(&mock.socket(), &arguments).await.with(0).json();
    assert_eq!(json["name"], "/srv/on-host.iso");
    assert_eq!(mock.state().calls, ["import from path"]);
}

/// The one request id that an agent was given `times` times.
fn one_id(mock: &Mock, times: usize) -> String {
    let ids = mock.state().request_ids;
    assert_eq!(ids.len(), times);
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    ids[0].clone()
}

#[tokio::test]
async fn an_image_is_deleted_again_with_the_same_id_after_the_connection_broke() {
    let mut mock = Mock::new(State {
        hang: true,
        ..Default::default()
    });
    let run = Running::start(&mock.socket(), &["image", "delete", "fixer"]);
    mock.until(|state| state.calls.contains(&"delete image"))
        .await;
    mock.stop();
    mock.change(|state| state.hang = false);
    mock.start();
    let ended = run.end().await.with(0);
    assert!(ended.err.contains("broke; asking again"), "{}", ended.err);
    assert!(uuid::Uuid::parse_str(&one_id(&mock, 2)).is_ok());
}

#[tokio::test]
async fn an_import_is_sent_again_with_the_same_id_after_the_connection_broke() {
    let mut mock = Mock::new(State {
        hang: true,
        ..Default::default()
    });
    let file = mock.folder().join("fix.raw");
    std::fs::write(&file, "content").unwrap();
    let run = Running::start(&mock.socket(), &["image", "import", file.to_str().unwrap()]);
    mock.until(|state| state.import_begun).await;
    mock.stop();
    mock.change(|state| {
        state.hang = false;
        state.late = 1;
    });
    mock.start();
    run.end().await.with(0);
    one_id(&mock, 3);
    assert_eq!(mock.state().imports.len(), 1);
    assert_eq!(mock.state().imports[0].1, b"content");
}

#[tokio::test]
async fn an_import_on_the_host_is_asked_for_again_with_the_same_id() {
    let mock = Mock::new(State {
        late: 1,
        ..Default::default()
    });
    let arguments = [
        "image",
        "import",
        "/srv/on-host.iso",
        "--on-host",
        "--request-id",
        ID,
    ];
    run(&mock.socket(), &arguments).await.with(0);
    assert_eq!(one_id(&mock, 2), ID);
}

#[tokio::test]
async fn images_are_listed_shown_and_deleted() {
    let image = v1::Image {
        id: ID.into(),
        name: "fixer".into(),
        format: ImageFormat::Iso.into(),
        size_bytes: 1536 << 20,
        virtual_size_bytes: 10 << 30,
        properties: [
            ("b".to_owned(), "2".to_owned()),
            ("a".to_owned(), "1".to_owned()),
        ]
        .into(),
        create_time: at(0),
        references: 3,
        ..Default::default()
    };
    let mock = Mock::new(State {
        images: vec![image],
        ..Default::default()
    });
    let ended = run(&mock.socket(), &["image", "ls"]).await.with(0);
    assert_eq!(
        ended.out,
        format!(
            "ID                                    NAME   FORMAT  SIZE     DISK SIZE  USED BY\n\
             {ID}  fixer  iso     1.5 GiB  10 GiB     3\n"
        )
    );
    let ended = run(&mock.socket(), &["image", "show", "fixer"])
        .await
        .with(0);
    assert!(
        ended.out.contains("property:   a=1\n            b=2\n"),
        "{}",
        ended.out
    );
    let json = run(&mock.socket(), &["image", "list", "-o", "json"])
        .await
        .with(0)
        .json();
    assert_eq!(json["images"][0]["format"], "IMAGE_FORMAT_ISO");
    assert_eq!(json["images"][0]["size_bytes"], "1610612736");
    let ended = run(&mock.socket(), &["image", "delete", "fixer"])
        .await
        .with(0);
    assert_eq!(ended.out, "");
}
