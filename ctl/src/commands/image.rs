// SPDX-License-Identifier: Apache-2.0
//! `salvor image`.

use std::{io, path::Path};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use salvor_proto::v1::{self, import_image_request::Part};
use tokio::{fs::File, io::AsyncReadExt as _, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

use super::{Session, action::unless_interrupted, pages};
use crate::{
    cli::{ImageCommand, ImportArgs},
    connect::{ANSWER_TIMEOUT, Again, ask, repeat, repeat_for},
    errors::Failure,
    output::{Ui, show},
    requests::map,
    units::show_bytes,
};

/// Images that are asked for at once.
const PAGE: i32 = 500;
/// Bytes in a message; the API takes 1 MiB.
const CHUNK: usize = 1 << 20;
/// Messages that are read ahead.
const AHEAD: usize = 2;

/// Does what is asked for.
pub(super) async fn run(session: &Session, command: ImageCommand) -> Result<(), Failure> {
    let agent = &session.agent;
    match command {
        ImageCommand::Import(args) => import(session, args).await,
        ImageCommand::List => list(session).await,
        ImageCommand::Show { image } => {
            let request = v1::GetImageRequest { image };
            let call = repeat(&session.ui, async || {
                agent.images().get_image(ask(request.clone())).await
            });
            let image = call
                .await?
                .image
                .ok_or(Failure::Protocol("answered without the image"))?;
            session.ui.result(&image, show::image)
        }
        ImageCommand::Delete { image, repeatable } => {
            let request_id = repeatable.request_id();
            let request = v1::DeleteImageRequest {
                image,
                request_id: request_id.clone(),
            };
            let call = repeat_for(&session.ui, ANSWER_TIMEOUT, async || {
                agent.images().delete_image(ask(request.clone())).await
            });
            let answer = unless_interrupted(&request_id, async { Ok(call.await?) }).await?;
            session.ui.result(&answer, |_| String::new())
        }
    }
}

/// Every page as one answer.
async fn list(session: &Session) -> Result<(), Failure> {
    let mut request = v1::ListImagesRequest {
        page_size: PAGE,
        page_token: String::new(),
    };
    let mut all = v1::ListImagesResponse::default();
    pages(async |page_token| {
        request.page_token = page_token;
        let page = repeat(&session.ui, async || {
            session
                .agent
                .images()
                .list_images(ask(request.clone()))
                .await
        })
        .await?;
        all.images.extend(page.images);
        Ok(page.next_page_token)
    })
    .await?;
    session.ui.result(&all, show::images)
}

async fn import(session: &Session, args: ImportArgs) -> Result<(), Failure> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => args
            .file
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
    };
    let spec = v1::ImageSpec {
        id: args.id.map(|id| id.to_string()).unwrap_or_default(),
        name,
        format: args.format.map_or(0, |format| format.api()),
        properties: map("--property", &args.properties)?,
        sha256: args.sha256.clone().unwrap_or_default(),
        size_bytes: None,
    };
    let limit = args.patience.wait_timeout;
    let id = args.repeatable.request_id();
    let imported = timeout(limit, async {
        let mut again = Again::new(limit);
        loop {
            let end = if args.on_host {
                from_host(session, spec.clone(), &args.file, &id).await
            } else {
                send(session, spec.clone(), &args.file, &id).await
            };
            match end {
                Err(Failure::Call(status)) => again.after(&session.ui, *status).await?,
                end => return end,
            }
        }
    });
    // Giving up drops the call, and with it what was imported in part.
    let image = imported
        .await
        .map_err(|_| Failure::ImportTooSlow { after: limit })?
        .map_err(|failure| failure.unanswered(&id))?;
    session.ui.result(&image, show::image)
}

/// Has the agent read the file.
async fn from_host(
    session: &Session,
    spec: v1::ImageSpec,
    file: &Path,
    request_id: &str,
) -> Result<v1::Image, Failure> {
    let Some(path) = file.to_str() else {
        return Err(Failure::Usage(format!(
            "{} is not valid UTF-8",
            file.display()
        )));
    };
    let request = v1::ImportImageFromPathRequest {
        spec: Some(spec),
        path: path.to_owned(),
        request_id: request_id.to_owned(),
    };
    let mut stream = session
        .agent
        .images()
        .import_image_from_path(Request::new(request))
        .await?
        .into_inner();
    let bar = Bytes::new(&session.ui, 0);
    let mut image = None;
    while let Some(message) = stream.message().await? {
        bar.at(message.copied_bytes, message.total_bytes);
        image = message.image.or(image);
    }
    image.ok_or(Failure::Protocol("ended the import without an image"))
}

/// Sends the file.
async fn send(
    session: &Session,
    mut spec: v1::ImageSpec,
    path: &Path,
    request_id: &str,
) -> Result<v1::Image, Failure> {
    let failed = |cause: io::Error| Failure::File {
        what: format!("cannot read {}", path.display()),
        cause,
    };
    let file = File::open(path).await.map_err(failed)?;
    let metadata = file.metadata().await.map_err(failed)?;
    if metadata.is_dir() {
        return Err(Failure::Usage(format!("{} is a folder", path.display())));
    }
    // A block device has no length of its own; there the end is the end.
    let length = metadata.is_file().then_some(metadata.len());
    spec.size_bytes = length;
    let first = v1::ImportImageRequest {
        part: Some(Part::Spec(spec)),
        request_id: request_id.to_owned(),
    };
    let bar = Bytes::new(&session.ui, length.unwrap_or(0));
    let (parts, stream) = mpsc::channel(AHEAD);
    let mut images = session.agent.images();
    let call = images.import_image(ReceiverStream::new(stream));
    tokio::pin!(call);
    let answer = tokio::select! {
        // If the agent has answered, what became of the file is of no interest.
        biased;
        answer = &mut call => answer,
        end = feed(file, first, &parts, &bar) => match end {
            // Returning drops the call: a file that was read in part must never look complete.
            Err(cause) => return Err(failed(cause)),
            Ok(read) if length.is_some_and(|length| length != read) => {
                return Err(failed(io::Error::other("it changed while it was read")));
            }
            Ok(_) => {
                drop(parts);
                call.await
            }
        },
    };
    answer?
        .into_inner()
        .image
        .ok_or(Failure::Protocol("answered without the image"))
}

/// Puts the file into the stream and returns its length. The stream stays open.
async fn feed(
    mut file: File,
    first: v1::ImportImageRequest,
    parts: &mpsc::Sender<v1::ImportImageRequest>,
    bar: &Bytes,
) -> io::Result<u64> {
    let gone = |_| io::Error::other("the agent no longer takes it");
    parts.send(first).await.map_err(gone)?;
    file.set_max_buf_size(CHUNK);
    let mut sent = 0_u64;
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let read = (&mut file)
            .take(CHUNK as u64)
            .read_to_end(&mut chunk)
            .await?;
        if read == 0 {
            return Ok(sent);
        }
        parts
            .send(v1::ImportImageRequest {
                part: Some(Part::Chunk(chunk)),
                ..v1::ImportImageRequest::default()
            })
            .await
            .map_err(gone)?;
        sent = sent.saturating_add(read as u64);
        bar.at(sent, 0);
    }
}

/// How much of a file has gone its way, on standard error if that is a terminal.
#[derive(Debug)]
struct Bytes(ProgressBar);

impl Bytes {
    fn new(ui: &Ui, total: u64) -> Self {
        let target = if ui.live() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = "{bar:30} {percent:>3}% of {total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        if total > 0 {
            ui.note_unless_live(&format!("sending {}", show_bytes(total)));
        }
        Self(bar)
    }

    /// `total` is kept as it is if it is 0.
    fn at(&self, bytes: u64, total: u64) {
        if total > 0 {
            self.0.set_length(total);
        }
        self.0.set_position(bytes);
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
