// SPDX-License-Identifier: Apache-2.0
//! Calls on images that are repeated with their request id.

use salvor_proto::v1::{self, import_image_request::Part};
use tonic::{Code, Status};

use crate::harness::{Agent, refusal, rescue};

const ID: &str = "0b6f6c3e-95f4-4a5e-bb3f-2f4f8a1d7c90";
const OTHER: &str = "7d4a1f0b-1c55-4c8e-9a2c-58f6f0f2b7e1";

async fn upload(agent: &Agent, id: &str, name: &str, bytes: &[u8]) -> Result<v1::Image, Status> {
    let spec = v1::ImageSpec {
        name: name.to_owned(),
        format: v1::ImageFormat::Raw.into(),
        properties: [("a", "1"), ("b", "2"), ("c", "3")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        ..v1::ImageSpec::default()
    };
    let messages = [
        v1::ImportImageRequest {
            part: Some(Part::Spec(spec)),
            request_id: id.to_owned(),
        },
        v1::ImportImageRequest {
            part: Some(Part::Chunk(bytes.to_vec())),
            ..v1::ImportImageRequest::default()
        },
    ];
    let answer = agent
        .images()
        .import_image(tokio_stream::iter(messages))
        .await?;
    Ok(answer.into_inner().image.unwrap())
}

async fn from_path(agent: &Agent, id: &str, name: &str, path: &str) -> Result<v1::Image, Status> {
    let request = v1::ImportImageFromPathRequest {
        spec: Some(v1::ImageSpec {
            name: name.to_owned(),
            format: v1::ImageFormat::Raw.into(),
            ..v1::ImageSpec::default()
        }),
        path: path.to_owned(),
        request_id: id.to_owned(),
    };
    let mut stream = agent
        .images()
        .import_image_from_path(request)
        .await?
        .into_inner();
    let mut image = None;
    while let Some(message) = stream.message().await? {
        image = message.image;
    }
    Ok(image.unwrap())
}

async fn delete(agent: &Agent, id: &str, image: &str) -> Result<(), Status> {
    let request = v1::DeleteImageRequest {
        image: image.to_owned(),
        request_id: id.to_owned(),
    };
    agent.images().delete_image(request).await.map(|_| ())
}

fn is_reused<T: std::fmt::Debug>(answer: Result<T, Status>) {
    let (code, reason, details) = refusal(answer);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "REQUEST_ID_REUSED")
    );
    assert_eq!(
        details.bad_request().unwrap().field_violations[0].field,
        "request_id"
    );
}

async fn count(agent: &Agent) -> usize {
    agent.store.images().await.unwrap().len()
}

#[tokio::test]
async fn a_repeated_upload_is_answered_with_its_image_also_after_a_restart() {
    let agent = Agent::start().await;
    let first = upload(&agent, ID, "abc", b"abc").await.unwrap();
    assert_eq!(upload(&agent, ID, "abc", b"abc").await.unwrap(), first);
    let agent = agent.restart().await;
    assert_eq!(upload(&agent, ID, "abc", b"abc").await.unwrap(), first);
    assert_eq!(count(&agent).await, 1);
    // Another request is another image.
    let other = upload(&agent, OTHER, "abc", b"abc").await.unwrap();
    assert_ne!(other.id, first.id);
    // What was imported once is not imported again because it is gone by now.
    delete(&agent, "", &first.id).await.unwrap();
    assert_eq!(upload(&agent, ID, "abc", b"abc").await.unwrap(), first);
    assert_eq!(count(&agent).await, 1);
}

#[tokio::test]
async fn a_request_id_with_another_upload_is_refused() {
    let agent = Agent::start().await;
    upload(&agent, ID, "abc", b"abc").await.unwrap();
    is_reused(upload(&agent, ID, "abd", b"abc").await);
    is_reused(upload(&agent, ID, "abc", b"abd").await);
    let path = agent.importable("abc.raw", b"abc");
    is_reused(from_path(&agent, ID, "abc", path.to_str().unwrap()).await);
    is_reused(delete(&agent, ID, "abc").await);
    assert_eq!(count(&agent).await, 1);
}

#[tokio::test]
async fn a_repeated_import_of_a_file_is_answered_with_its_image() {
    let agent = Agent::start().await;
    let file = agent.importable("abc.raw", b"abc");
    let path = file.to_str().unwrap();
    let first = from_path(&agent, ID, "abc", path).await.unwrap();
    std::fs::write(&file, b"something else").unwrap();
    let agent = agent.restart().await;
    assert_eq!(from_path(&agent, ID, "abc", path).await.unwrap(), first);
    let other = agent.importable("abd.raw", b"abc");
    is_reused(from_path(&agent, ID, "abc", other.to_str().unwrap()).await);
}

#[tokio::test]
async fn a_repeated_delete_is_a_success_and_deletes_nothing_else() {
    let agent = Agent::start().await;
    upload(&agent, "", "abc", b"abc").await.unwrap();
    delete(&agent, ID, "abc").await.unwrap();
    delete(&agent, ID, "abc").await.unwrap();
    // Another image of that name is not what was asked for then.
    upload(&agent, "", "abc", b"abd").await.unwrap();
    let agent = agent.restart().await;
    delete(&agent, ID, "abc").await.unwrap();
    assert_eq!(count(&agent).await, 1);
    is_reused(delete(&agent, ID, "abd").await);
    delete(&agent, OTHER, "abc").await.unwrap();
    assert_eq!(refusal(delete(&agent, "", "abc").await).0, Code::NotFound);
}

#[tokio::test]
async fn calls_made_twice_at_once_act_once() {
    let agent = Agent::start().await;
    let (first, second) = tokio::join!(
        upload(&agent, ID, "abc", b"abc"),
        upload(&agent, ID, "abc", b"abc")
    );
    assert_eq!(first.unwrap(), second.unwrap());
    let (first, second) = tokio::join!(delete(&agent, OTHER, "abc"), delete(&agent, OTHER, "abc"));
    first.unwrap();
    second.unwrap();
    assert_eq!(count(&agent).await, 0);
}

#[tokio::test]
async fn the_id_of_an_action_is_none_for_an_image_and_the_other_way_round() {
    let agent = Agent::start().await;
    let server = agent.server("web").await;
    let image = upload(&agent, ID, "abc", b"abc").await.unwrap();
    let asked = |id: &str| v1::RescueServerRequest {
        request_id: id.to_owned(),
        ..rescue(server, &image)
    };
    is_reused(agent.servers().rescue_server(asked(ID)).await);
    agent.servers().rescue_server(asked(OTHER)).await.unwrap();
    is_reused(upload(&agent, OTHER, "x", b"abc").await);
    is_reused(delete(&agent, OTHER, "abc").await);
}

#[tokio::test]
async fn a_request_id_is_a_uuid() {
    let agent = Agent::start().await;
    for answer in [
        refusal(upload(&agent, "x", "abc", b"abc").await),
        refusal(delete(&agent, "x", "abc").await),
    ] {
        assert_eq!(answer.0, Code::InvalidArgument);
        assert_eq!(
            answer.2.bad_request().unwrap().field_violations[0].field,
            "request_id"
        );
    }
}
