// SPDX-License-Identifier: Apache-2.0
//! ImageService: imports as streams, and the records of images.

use std::{pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt as _, stream};
use prost::Message as _;
use salvor_proto::v1::{
    self, DeleteImageRequest, DeleteImageResponse, GetImageRequest, GetImageResponse,
    ImportImageFromPathRequest, ImportImageFromPathResponse, ImportImageRequest,
    ImportImageResponse, ListImagesRequest, ListImagesResponse, image_service_server::ImageService,
    import_image_request::Part,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::{
    Api,
    convert::image::image,
    edge::Call,
    errors::{About, coded, status},
    import::{Upload, Wanted, allowed, reader},
    page::{self, PAGE_BYTES},
    resolve,
    validate::{self, Checked},
    wish::hash_of,
};
use crate::{
    cancel::Cancel,
    core::{
        image::ImageRecord,
        reason::{Reason, Refusal},
    },
    dispatch::refused,
    engine::now_ms,
    storage::apart,
    store::Request as Repeatable,
};

/// The most bytes of an image in one message.
const CHUNK: usize = 1 << 20;

/// An upload may be silent so long.
const IDLE: Duration = Duration::from_secs(60);

/// An upload may take so long: 64 GiB at 3 MB/s.
const UPLOAD: Duration = Duration::from_secs(6 * 3_600);

/// Progress is told after so many more bytes.
const PROGRESS: u64 = 16 << 20;

/// The next message of an upload and the request id in it; `None` at its end.
async fn next<S>(stream: &mut S, end: Instant) -> Result<Option<(Part, String)>, Failure>
where
    S: Stream<Item = Result<ImportImageRequest, Status>> + Unpin,
{
    let until = end.min(Instant::now() + IDLE);
    match timeout_at(until, stream.next()).await {
        Ok(None) => Ok(None),
        Ok(Some(Ok(message))) => match message.part {
            Some(part) => Ok(Some((part, message.request_id))),
            None => Err(Refusal::field("part", "must be a spec or a chunk").into()),
        },
        Ok(Some(Err(status))) => Err(Failure::Stream(status)),
        Err(_) => Err(Refusal::new(
            Reason::DeadlineExceeded,
            format!(
                "the upload was silent for {} s or took longer than {} h; nothing was imported",
                IDLE.as_secs(),
                UPLOAD.as_secs() / 3_600
            ),
        )
        .into()),
    }
}

/// Why an upload failed.
enum Failure {
    /// It was refused.
    Refused(Refusal),
    /// The client's stream broke.
    Stream(Status),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// The error of a call that is about an image itself: a missing one is NOT_FOUND.
fn about_image(call: &Call, refusal: &Refusal) -> Status {
    match refusal.reason {
        Reason::ImageNotFound => coded(tonic::Code::NotFound, refusal, &call.about()),
        _ => status(refusal, &call.about()),
    }
}

/// Ends the import when the client no longer listens.
struct Listening(watch::Sender<bool>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

impl Api {
    async fn upload<S>(&self, call: &Call, mut stream: S) -> Result<ImageRecord, Failure>
    where
        S: Stream<Item = Result<ImportImageRequest, Status>> + Unpin,
    {
        let end = Instant::now() + UPLOAD;
        let Some((Part::Spec(spec), request_id)) = next(&mut stream, end).await? else {
            return Err(Refusal::field("spec", "must be the first message").into());
        };
        let wanted = Wanted::read(spec, "", &request_id, call.caller.to_string())?;
        let mut upload = Upload::begin(self, wanted).await?;
        while let Some((part, _)) = next(&mut stream, end).await? {
            let Part::Chunk(chunk) = part else {
                return Err(Refusal::field("spec", "must be the first message only").into());
            };
            if chunk.len() > CHUNK {
                let rule = format!("must be at most {CHUNK} bytes, and is {}", chunk.len());
                return Err(Refusal::field("chunk", rule).into());
            }
            upload = upload.write(chunk).await?;
        }
        // tonic ends the stream of a call that its client has cancelled as if it were whole. The
        // server drops such a call as soon as its handler waits, so it waits once before it keeps
        // what may be half an image.
        tokio::task::yield_now().await;
        Ok(upload.finish().await?)
    }

    async fn shown(&self, record: &ImageRecord) -> v1::Image {
        let images = self.store.images().await.unwrap_or_default();
        let references = images.iter().find(|(image, _)| image.id == record.id);
        image(record, references.map_or(0, |(_, references)| *references))
    }

    async fn page_of_images(&self, request: &ListImagesRequest) -> Checked<ListImagesResponse> {
        let size = validate::page_size(request.page_size)?;
        // Images are in order of name and id; both are in the token, so the image may be gone.
        let place = |text: &str| {
            let (id, name) = text.split_once(':')?;
            Some((name.to_owned(), Uuid::try_parse(id).ok()?))
        };
        let last = page::place('i', &request.page_token, place)?;
        let mut response = ListImagesResponse::default();
        let mut bytes = 0;
        for (record, references) in self.store.images().await.map_err(refused)? {
            let before = |(name, id): &(String, Uuid)| {
                (name.as_str(), *id) >= (record.name.as_str(), record.id)
            };
            if last.as_ref().is_some_and(before) {
                continue;
            }
            if response.images.len() == size || bytes >= PAGE_BYTES {
                if let Some(last) = response.images.last() {
                    response.next_page_token =
                        page::token('i', &format!("{}:{}", last.id, last.name));
                }
                break;
            }
            let shown = image(&record, references);
            bytes += shown.encoded_len();
            response.images.push(shown);
        }
        Ok(response)
    }

    async fn delete(&self, call: &Call, mut message: DeleteImageRequest) -> Checked<()> {
        let id = validate::request_id(&std::mem::take(&mut message.request_id))?;
        let request = Repeatable {
            id,
            body_hash: hash_of("delete image", &message, &[]),
            caller: call.caller.to_string(),
            who: call.who.clone(),
        };
        let found = resolve::image(&self.store, &message.image).await;
        // What a repeated request names is gone by now, by its own doing.
        let repeated = self.store.repeated_on_image(request.clone()).await;
        if repeated.map_err(refused)?.is_some() {
            return Ok(());
        }
        let (record, _) = found?;
        let _claim = self.hold(record.id, &request).await?;
        self.store
            .remove_image(record.id, request, now_ms())
            .await
            .map_err(refused)?;
        // The record is gone and with it the image; a file that stays is swept at the next start.
        self.remove_file(record.id).await;
        Ok(())
    }
}

#[tonic::async_trait]
impl ImageService for Api {
    type ImportImageFromPathStream =
        Pin<Box<dyn Stream<Item = Result<ImportImageFromPathResponse, Status>> + Send>>;

    async fn import_image(
        &self,
        request: Request<Streaming<ImportImageRequest>>,
    ) -> Result<Response<ImportImageResponse>, Status> {
        let (call, stream) = Call::open(request)?;
        match self.upload(&call, stream).await {
            Ok(record) => Ok(Response::new(ImportImageResponse {
                image: Some(self.shown(&record).await),
            })),
            Err(Failure::Refused(refusal)) => Err(call.refuse(&refusal)),
            Err(Failure::Stream(status)) => Err(status),
        }
    }

    async fn import_image_from_path(
        &self,
        request: Request<ImportImageFromPathRequest>,
    ) -> Result<Response<Self::ImportImageFromPathStream>, Status> {
        let (call, message) = Call::open(request)?;
        let checked = async {
            let spec = message
                .spec
                .ok_or_else(|| Refusal::field("spec", "must be given"))?;
            let caller = call.caller.to_string();
            let wanted = Wanted::read(spec, &message.path, &message.request_id, caller)?;
            let folders = self.host.import_dirs.clone();
            let whose = reader(&message.path, &folders);
            let (path, size) = apart::look(&whose, move || allowed(&message.path, &folders))
                .await
                .map_err(|error| Refusal::field("path", error.to_string()))??;
            Ok((wanted, (whose, path), size))
        };
        let (wanted, path, total_bytes) = checked.await.map_err(|refusal| call.refuse(&refusal))?;

        // Progress that nobody has fetched yet is dropped; the outcome never is.
        let (tell, told) = mpsc::channel(2);
        let (cancelled, cancel) = watch::channel(false);
        let api = self.clone();
        tokio::spawn(async move {
            let last = std::sync::atomic::AtomicU64::new(0);
            let progress = tell.clone();
            let imported =
                api.import_path(wanted, path, Cancel::from(cancel), move |copied_bytes| {
                    use std::sync::atomic::Ordering::Relaxed;
                    if copied_bytes >= last.load(Relaxed).saturating_add(PROGRESS) {
                        last.store(copied_bytes, Relaxed);
                        let _ = progress.try_send(Ok(ImportImageFromPathResponse {
                            copied_bytes,
                            total_bytes,
                            image: None,
                        }));
                    }
                });
            let outcome = match imported.await {
                Ok(record) => Ok(ImportImageFromPathResponse {
                    copied_bytes: total_bytes,
                    total_bytes,
                    image: Some(api.shown(&record).await),
                }),
                Err(refusal) => Err(call.refuse(&refusal)),
            };
            // A client that is gone does not want to know.
            let _ = tell.send(outcome).await;
        });
        let stream = stream::unfold(
            (told, Listening(cancelled)),
            |(mut told, listening)| async move {
                told.recv().await.map(|item| (item, (told, listening)))
            },
        );
        Ok(Response::new(Box::pin(stream)))
    }

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let (call, message) = Call::open(request)?;
        let page = self.page_of_images(&message).await;
        page.map(Response::new)
            .map_err(|refusal| call.refuse(&refusal))
    }

    async fn get_image(
        &self,
        request: Request<GetImageRequest>,
    ) -> Result<Response<GetImageResponse>, Status> {
        let (call, message) = Call::open(request)?;
        match resolve::image(&self.store, &message.image).await {
            Ok((record, references)) => Ok(Response::new(GetImageResponse {
                image: Some(image(&record, references)),
            })),
            Err(refusal) => Err(about_image(&call, &refusal)),
        }
    }

    async fn delete_image(
        &self,
        request: Request<DeleteImageRequest>,
    ) -> Result<Response<DeleteImageResponse>, Status> {
        let (call, message) = Call::open(request)?;
        let about = About {
            subject: message.image.chars().take(256).collect(),
            ..call.about()
        };
        match self.delete(&call, message).await {
            Ok(()) => Ok(Response::new(DeleteImageResponse {})),
            Err(refusal) if refusal.reason == Reason::ImageNotFound => {
                Err(about_image(&call, &refusal))
            }
            Err(refusal) => Err(status(&refusal, &about)),
        }
    }
}
