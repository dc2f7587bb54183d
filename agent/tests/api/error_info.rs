// SPDX-License-Identifier: Apache-2.0
//! Every error of every call says why in a way that programs can read.

use prost::{
    Message as _,
    bytes::{Buf as _, BufMut as _},
};
use prost_types::FileDescriptorSet;
use salvor_proto::google::longrunning::DeleteOperationRequest;
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};

use crate::harness::{Agent, refusal};

/// Messages as they are on the wire.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining()).to_vec()))
    }
}

/// The paths of all calls of the services that are this agent's own.
fn paths() -> Vec<String> {
    let set = FileDescriptorSet::decode(salvor_proto::DESCRIPTORS).unwrap();
    let mut paths = Vec::new();
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                let (package, service) = (file.package(), service.name());
                paths.push(format!("/{package}.{service}/{}", method.name()));
            }
        }
    }
    assert!(paths.len() > 20, "{paths:?}");
    paths
}

/// Sends one message, which is also a stream of one, and reads the first answer.
async fn call(agent: &Agent, path: &str, message: Vec<u8>) -> Result<Option<Vec<u8>>, Status> {
    let mut client = Grpc::<Channel>::new(agent.channel());
    client.ready().await.unwrap();
    let path: PathAndQuery = path.parse().unwrap();
    let answer = client.server_streaming(Request::new(message), path, Raw);
    let mut answers: Streaming<Vec<u8>> = answer.await?.into_inner();
    answers.message().await
}

#[tokio::test]
async fn whatever_a_call_is_sent_its_error_says_why() {
    let agent = Agent::start().await;
    for path in paths() {
        // A length that is longer than the message: no message of any type.
        let (code, reason, _) = refusal(call(&agent, &path, vec![0x0a, 0xff, 0x01]).await);
        let expected = (Code::InvalidArgument, "INVALID_REQUEST");
        assert_eq!((code, reason.as_str()), expected, "{path}");
        let long = call(&agent, &path, vec![0; (4 << 20) + 1]).await;
        let (code, reason, _) = refusal(long);
        assert_eq!((code, reason.as_str()), expected, "{path}");
        // An empty message is right for a few and wrong for most.
        if let Err(status) = call(&agent, &path, Vec::new()).await {
            refusal::<()>(Err(status));
        }
        let service = path.rsplit_once('/').unwrap().0;
        let unknown = call(&agent, &format!("{service}/NoSuchCall"), Vec::new()).await;
        let (code, reason, _) = refusal(unknown);
        let expected = (Code::Unimplemented, "NOT_SUPPORTED");
        assert_eq!((code, reason.as_str()), expected, "{path}");
    }
}

#[tokio::test]
async fn operations_are_not_deleted_and_the_error_says_what_is_done_instead() {
    let agent = Agent::start().await;
    let name = "operations/7f0c1a52-3d9e-4b6f-8a21-5c0e9d7b4f13".to_owned();
    let request = DeleteOperationRequest { name };
    let answer = agent.operations().delete_operation(request).await;
    let message = answer.as_ref().unwrap_err().message().to_owned();
    assert!(message.contains("CancelOperation"), "{message}");
    let (code, reason, _) = refusal(answer);
    let expected = (Code::Unimplemented, "NOT_SUPPORTED");
    assert_eq!((code, reason.as_str()), expected);
}
