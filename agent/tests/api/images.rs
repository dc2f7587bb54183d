// SPDX-License-Identifier: Apache-2.0
//! ImageService.

use std::collections::HashMap;

use salvor_proto::v1::{self, import_image_request::Part};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::harness::{Agent, refusal, upload};

/// SHA-256 of `abc`, from FIPS 180.
const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

async fn send(agent: &Agent, parts: Vec<Part>) -> Result<v1::Image, Status> {
    let messages = parts.into_iter().map(|part| v1::ImportImageRequest {
        part: Some(part),
        ..Default::default()
    });
    let answer = agent
        .images()
        .import_image(tokio_stream::iter(messages.collect::<Vec<_>>()))
        .await?;
    Ok(answer.into_inner().image.unwrap())
}

fn spec() -> v1::ImageSpec {
    v1::ImageSpec {
        id: "7f0c1a52-3d9e-4b6f-8a21-5c0e9d7b4f13".to_owned(),
        name: "abc".to_owned(),
        format: v1::ImageFormat::Raw.into(),
        properties: HashMap::from([("hw_rescue_bus".to_owned(), "usb".to_owned())]),
        ..v1::ImageSpec::default()
    }
}

fn chunk(bytes: &[u8]) -> Part {
    Part::Chunk(bytes.to_vec())
}

/// Images whose files may be there without a record.
async fn noted(agent: &Agent) -> Vec<String> {
    let noted = agent.store.image_files_without_record().await.unwrap();
    noted.iter().map(Uuid::to_string).collect()
}

fn files(agent: &Agent) -> Vec<String> {
    let folder = agent.dir.path().join("state/images");
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

async fn from_path(agent: &Agent, spec: v1::ImageSpec, path: &str) -> Result<v1::Image, Status> {
    let request = v1::ImportImageFromPathRequest {
        spec: Some(spec),
        path: path.to_owned(),
        ..Default::default()
    };
    let mut stream = agent
        .images()
        .import_image_from_path(request)
        .await?
        .into_inner();
    let mut image = None;
    while let Some(message) = stream.message().await? {
        assert!(image.is_none(), "the image is in the last message");
        image = message.image;
    }
    Ok(image.expect("the last message carries the image"))
}

#[tokio::test]
async fn an_image_is_sent_shown_and_deleted() {
    let agent = Agent::start().await;
    let parts = || vec![Part::Spec(spec()), chunk(b"a"), chunk(b""), chunk(b"bc")];
    let image = send(&agent, parts()).await.unwrap();
    assert_eq!(
        (image.sha256.as_str(), image.size_bytes, image.references),
        (ABC, 3, 0)
    );
    assert_eq!(image.properties["hw_rescue_bus"], "usb");
    // The same again is a success, another image under its id is not.
    assert_eq!(send(&agent, parts()).await.unwrap(), image);
    let (code, reason, _) = refusal(send(&agent, vec![Part::Spec(spec()), chunk(b"abd")]).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::AlreadyExists, "IMAGE_EXISTS")
    );

    let get = async |image: &str| {
        let request = v1::GetImageRequest {
            image: image.to_owned(),
        };
        agent
            .images()
            .get_image(request)
            .await
            .map(|answer| answer.into_inner().image.unwrap())
    };
    for word in ["abc", "7f0c1a52", &image.id] {
        assert_eq!(get(word).await.unwrap(), image);
    }
    let delete = async || {
        let request = v1::DeleteImageRequest {
            image: "abc".to_owned(),
            ..Default::default()
        };
        agent.images().delete_image(request).await
    };
    let id = Uuid::parse_str(&image.id).unwrap();
    agent
        .store
        .hold_image(id, "server/1".to_owned())
        .await
        .unwrap();
    assert_eq!(get("abc").await.unwrap().references, 1);
    let (code, reason, details) = refusal(delete().await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::FailedPrecondition, "IMAGE_IN_USE")
    );
    assert_eq!(details.resource_info().unwrap().resource_name, "abc");
    agent
        .store
        .release_image(id, "server/1".to_owned())
        .await
        .unwrap();
    delete().await.unwrap();
    assert!(files(&agent).is_empty());
    assert!(noted(&agent).await.is_empty());
    let (code, reason, _) = refusal(get("abc").await);
    assert_eq!((code, reason.as_str()), (Code::NotFound, "IMAGE_NOT_FOUND"));
    assert_eq!(refusal(delete().await).0, Code::NotFound);
}

#[tokio::test]
async fn properties_that_are_understood_have_rules_and_all_others_are_kept() {
    let agent = Agent::start().await;
    for (name, value) in [
        ("hw_rescue_bus", "xen"),
        ("hw_rescue_device", "lun"),
        ("os_admin_user", "root:x"),
        ("os_admin_user", ""),
    ] {
        let mut odd = spec();
        odd.properties = HashMap::from([(name.to_owned(), value.to_owned())]);
        let (code, reason, details) =
            refusal(send(&agent, vec![Part::Spec(odd), chunk(b"abc")]).await);
        assert_eq!(
            (code, reason.as_str()),
            (Code::InvalidArgument, "INVALID_FIELD")
        );
        let violation = &details.bad_request().unwrap().field_violations[0];
        assert_eq!(violation.field, format!("spec.properties[{name}]"));
        assert!(
            violation.description.starts_with("must be"),
            "{violation:?}"
        );
    }
    assert!(files(&agent).is_empty());
    let mut spec = spec();
    spec.properties = [
        ("os_admin_user", "_admin-1"),
        ("hw_machine_type", "no such thing"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    let wanted = spec.properties.clone();
    let image = send(&agent, vec![Part::Spec(spec), chunk(b"abc")])
        .await
        .unwrap();
    assert_eq!(image.properties, wanted);
}

#[tokio::test]
async fn an_import_that_fails_leaves_nothing() {
    let agent = Agent::start().await;
    let sum = v1::ImageSpec {
        sha256: ABC.replace('b', "c"),
        ..spec()
    };
    let qcow2 = v1::ImageSpec {
        format: v1::ImageFormat::Qcow2.into(),
        ..spec()
    };
    let longer = v1::ImageSpec {
        size_bytes: Some(4),
        ..spec()
    };
    let cases: Vec<(Vec<Part>, &str)> = vec![
        (vec![Part::Spec(sum), chunk(b"abc")], "IMAGE_CHECKSUM"),
        (vec![Part::Spec(longer), chunk(b"abc")], "IMAGE_CHECKSUM"),
        (vec![Part::Spec(qcow2), chunk(b"abc")], "IMAGE_UNSAFE"),
        (vec![Part::Spec(spec())], "IMAGE_UNSAFE"),
        (
            vec![
                Part::Spec(spec()),
                chunk(b"QFI\xfb\0\0\0\x03"),
                chunk(&[0; 600]),
            ],
            "IMAGE_UNSAFE",
        ),
        (vec![], "INVALID_FIELD"),
        (vec![chunk(b"abc")], "INVALID_FIELD"),
        (
            vec![Part::Spec(spec()), Part::Spec(spec())],
            "INVALID_FIELD",
        ),
        (
            vec![Part::Spec(spec()), chunk(&vec![0; (1 << 20) + 1])],
            "INVALID_FIELD",
        ),
    ];
    for (parts, expected) in cases {
        let (_, reason, _) = refusal(send(&agent, parts).await);
        assert_eq!(reason, expected);
        assert!(files(&agent).is_empty(), "{expected}");
    }
    for (field, wrong) in [
        (
            "spec.name",
            v1::ImageSpec {
                name: "a\0".to_owned(),
                ..spec()
            },
        ),
        (
            "spec.id",
            v1::ImageSpec {
                id: "../x".to_owned(),
                ..spec()
            },
        ),
        (
            "spec.format",
            v1::ImageSpec {
                format: 9,
                ..spec()
            },
        ),
        (
            "spec.sha256",
            v1::ImageSpec {
                sha256: "x".to_owned(),
                ..spec()
            },
        ),
    ] {
        let (code, _, details) = refusal(send(&agent, vec![Part::Spec(wrong)]).await);
        assert_eq!(code, Code::InvalidArgument);
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            field
        );
    }
    // After all that the id is free.
    send(&agent, vec![Part::Spec(spec()), chunk(b"abc")])
        .await
        .unwrap();
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing_and_frees_its_id() {
    let agent = Agent::start().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    for part in [Part::Spec(spec()), chunk(b"abc")] {
        sender
            .send(v1::ImportImageRequest {
                part: Some(part),
                ..Default::default()
            })
            .await
            .unwrap();
    }
    let mut client = agent.images();
    let call = tokio::spawn(async move {
        client
            .import_image(tokio_stream::wrappers::ReceiverStream::new(receiver))
            .await
    });
    let part = format!("{}.part", spec().id);
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    while files(&agent) != [part.clone()] {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the upload never began"
        );
        tokio::task::yield_now().await;
    }
    let (code, reason, _) = refusal(send(&agent, vec![Part::Spec(spec()), chunk(b"abc")]).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::AlreadyExists, "IMAGE_EXISTS")
    );
    // An agent that died now would know at its next start that the file is nobody's.
    assert_eq!(noted(&agent).await, [spec().id]);
    call.abort();
    while !files(&agent).is_empty() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the upload never ended: {:?}",
            files(&agent)
        );
        tokio::task::yield_now().await;
    }
    drop(sender);
    while send(&agent, vec![Part::Spec(spec()), chunk(b"abc")])
        .await
        .is_err()
    {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the id is never free"
        );
    }
    assert!(noted(&agent).await.is_empty());
}

#[tokio::test]
async fn a_file_of_an_import_folder_is_imported_and_no_other() {
    let agent = Agent::start().await;
    let path = agent.importable("image.raw", b"abc");
    let path = path.to_str().unwrap();
    let image = from_path(&agent, spec(), path).await.unwrap();
    assert_eq!(image.sha256, ABC);
    assert_eq!(from_path(&agent, spec(), path).await.unwrap(), image);
    agent.importable("image.raw", b"abd");
    assert_eq!(
        refusal(from_path(&agent, spec(), path).await).1,
        "IMAGE_EXISTS"
    );
    let new = || v1::ImageSpec {
        id: String::new(),
        ..spec()
    };
    let empty = agent.importable("empty.raw", b"");
    let (code, reason, details) = refusal(from_path(&agent, new(), empty.to_str().unwrap()).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "IMAGE_UNSAFE")
    );
    assert_eq!(
        details.bad_request().unwrap().field_violations[0].field,
        "path"
    );
    let secret = agent.dir.path().join("state/salvor.db");
    for outside in [
        secret.to_str().unwrap(),
        "/etc/passwd",
        "relative",
        "",
        &format!("{path}/../../state/salvor.db"),
        "/dev/zero",
    ] {
        let (code, _, details) = refusal(from_path(&agent, new(), outside).await);
        assert_eq!(code, Code::InvalidArgument);
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            "path"
        );
    }
}

#[tokio::test]
async fn pages_of_images_stay_valid_while_images_are_deleted() {
    let agent = Agent::start().await;
    for name in ["a", "b", "b", "c", "d"] {
        send(
            &agent,
            vec![
                Part::Spec(v1::ImageSpec {
                    id: String::new(),
                    name: name.to_owned(),
                    ..spec()
                }),
                chunk(b"x"),
            ],
        )
        .await
        .unwrap();
    }
    let list = async |page_size: i32, page_token: &str| {
        let request = v1::ListImagesRequest {
            page_size,
            page_token: page_token.to_owned(),
        };
        agent
            .images()
            .list_images(request)
            .await
            .unwrap()
            .into_inner()
    };
    let all = list(0, "").await;
    assert_eq!(all.images.len(), 5);
    let first = list(2, "").await;
    assert_eq!(first.images, all.images[..2]);
    let request = v1::DeleteImageRequest {
        image: first.images[1].id.clone(),
        ..Default::default()
    };
    agent.images().delete_image(request).await.unwrap();
    let second = list(2, &first.next_page_token).await;
    assert_eq!(second.images, all.images[2..4]);
    let third = list(2, &second.next_page_token).await;
    assert_eq!(third.images, all.images[4..]);
    assert_eq!(third.next_page_token, "");
}

#[tokio::test]
async fn the_usual_upload_of_the_tests_is_whole() {
    let agent = Agent::start().await;
    let stream = tokio_stream::iter(upload("x", &[1; 10_000]));
    let image = agent
        .images()
        .import_image(stream)
        .await
        .unwrap()
        .into_inner()
        .image
        .unwrap();
    assert_eq!(image.size_bytes, 10_000);
}
