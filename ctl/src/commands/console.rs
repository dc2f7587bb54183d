// SPDX-License-Identifier: Apache-2.0
//! What a server shows and says: `salvor server console-log`, `console` and `screenshot`.

use std::{
    io::{self, Read as _, Write as _},
    time::Duration,
};

use salvor_proto::v1::{
    self, attach_console_request::Item as Sent, attach_console_response::Item as Told,
    follow_console_log_request::From as FollowFrom, get_console_log_request::From,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use super::Session;
use crate::{
    cli::{ConsoleArgs, ConsoleLogArgs, ScreenshotArgs},
    connect::{BackOff, ask, is_away, repeat},
    errors::{Failure, broken},
    output::{guest::Shown, show, warn},
    terminal::Raw,
};

/// Ctrl and ].
const ESCAPE: u8 = 0x1d;

/// A stream that is silent for so long is dead: a live agent says every few seconds that there is
/// nothing new.
const SILENCE: Duration = Duration::from_secs(60);

/// For so long an agent that is away is waited for.
const AWAY: Duration = Duration::from_secs(300);

/// Typed keys are sent in pieces of up to this size.
const KEYS: usize = 4 << 10;

fn write(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(Failure::Output)
}

/// `salvor server console-log`.
pub(super) async fn log(session: &Session, args: ConsoleLogArgs) -> Result<(), Failure> {
    if args.follow {
        return follow(session, &args).await;
    }
    let mut request = v1::GetConsoleLogRequest {
        server: args.server.clone(),
        from: match (args.lines, args.bytes, &args.cursor) {
            _ if args.boots => Some(From::LastBytes(0)),
            (Some(lines), _, _) => Some(From::LastLines(lines)),
            (_, Some(bytes), _) => Some(From::LastBytes(bytes)),
            (_, _, Some(cursor)) => Some(From::Cursor(cursor.clone())),
            (None, None, None) => None,
        },
        guest: args.guest.map_or(0, |guest| guest.api()),
        boot: args.boot,
        max_bytes: 0,
    };
    let mut all = v1::GetConsoleLogResponse::default();
    let mut shown = Shown::default();
    loop {
        let page = repeat(&session.ui, async || {
            let request = ask(request.clone());
            session.agent.consoles().get_console_log(request).await
        });
        let page = page.await?;
        if page.gap {
            session.ui.note(GAP);
        }
        let more = page.more && !page.data.is_empty();
        request.from = Some(From::Cursor(page.next_cursor.clone()));
        let data = page.data.clone();
        all = v1::GetConsoleLogResponse {
            data: std::mem::take(&mut all.data),
            gap: all.gap || page.gap,
            ..page
        };
        if session.ui.is_json() {
            all.data.extend(data);
        } else if args.raw {
            write(&data)?;
        } else {
            session.ui.text(&shown.piece(&data))?;
        }
        if !more {
            break;
        }
    }
    if args.boots {
        return session.ui.result(&all, show::boots);
    }
    if args.show_cursor {
        warn(&format!("cursor: {}", all.next_cursor));
    }
    // In text everything but this was written as it came.
    let rest = shown.end();
    session.ui.result(&all, |_| rest)
}

const GAP: &str = "some of what was said is no longer kept";

/// Follows until the agent has been away for too long or the server is gone.
async fn follow(session: &Session, args: &ConsoleLogArgs) -> Result<(), Failure> {
    let mut request = v1::FollowConsoleLogRequest {
        server: args.server.clone(),
        from: match (args.lines, args.bytes, &args.cursor) {
            (Some(lines), _, _) => Some(FollowFrom::LastLines(lines)),
            (_, Some(bytes), _) => Some(FollowFrom::LastBytes(bytes)),
            (_, _, Some(cursor)) => Some(FollowFrom::Cursor(cursor.clone())),
            (None, None, None) => None,
        },
        guest: args.guest.map_or(0, |guest| guest.api()),
    };
    let mut shown = Shown::default();
    // Set while the agent is away.
    let mut away: Option<(Instant, BackOff)> = None;
    loop {
        let before = request.from.clone();
        let status = match pass_on(session, args, &mut request, &mut shown).await {
            Err(Failure::Call(status)) if is_away(&status) => status,
            other => return other,
        };
        if request.from != before {
            away = None;
        }
        let (deadline, pause) = away.get_or_insert_with(|| {
            let why = broken(&status);
            session
                .ui
                .note(&format!("{why}; going on when the agent is back"));
            (Instant::now() + AWAY, BackOff::default())
        });
        if !pause.wait(*deadline).await {
            return Err(status.into());
        }
    }
}

/// Writes what comes until the stream ends, and notes how far it came.
async fn pass_on(
    session: &Session,
    args: &ConsoleLogArgs,
    request: &mut v1::FollowConsoleLogRequest,
    shown: &mut Shown,
) -> Result<(), Failure> {
    let silent = |_| Status::unavailable("it has been silent for a minute");
    let mut consoles = session.agent.consoles();
    let call = consoles.follow_console_log(Request::new(request.clone()));
    let mut stream = timeout(SILENCE, call).await.map_err(silent)??.into_inner();
    while let Some(message) = timeout(SILENCE, stream.message()).await.map_err(silent)?? {
        request.from = Some(FollowFrom::Cursor(message.cursor.clone()));
        if message.gap {
            session.ui.note(GAP);
        }
        if args.raw && !session.ui.is_json() {
            write(&message.data)?;
        } else if !message.data.is_empty() {
            let text = shown.piece(&message.data);
            session.ui.item(&message, |_| text)?;
        }
        if args.show_cursor && !message.data.is_empty() {
            warn(&format!("cursor: {}", message.cursor));
        }
    }
    session.ui.note("the server is gone");
    Ok(())
}

/// Why the program leaves a console.
enum Left {
    /// The operator wants to, or standard input has ended.
    Asked,
    /// The guest or the agent ended it.
    Ended(String),
}

/// `salvor server console`.
pub(super) async fn attach(session: &Session, args: ConsoleArgs) -> Result<(), Failure> {
    let (sender, requests) = mpsc::channel(16);
    let open = v1::ConsoleOpen {
        server: args.server.clone(),
        read_only: args.read_only,
        force: args.force,
        history: !args.no_history,
    };
    // There is room: it is the first.
    let _ = sender.try_send(v1::AttachConsoleRequest {
        item: Some(Sent::Open(open)),
    });
    let mut consoles = session.agent.consoles();
    let call = consoles.attach_console(Request::new(ReceiverStream::new(requests)));
    let stream = call.await?.into_inner();
    let raw = Raw::of_stdin().map_err(|cause| Failure::File {
        what: "cannot use the terminal".to_owned(),
        cause,
    })?;
    let left = talk(session, &args, stream, sender, raw.is_some()).await;
    drop(raw);
    match left? {
        Left::Asked => {
            session.ui.note("left the console");
            Ok(())
        }
        Left::Ended(why) => Err(Failure::Ended(why)),
    }
}

/// Passes keys to the guest and its words to standard output.
async fn talk(
    session: &Session,
    args: &ConsoleArgs,
    mut stream: tonic::Streaming<v1::AttachConsoleResponse>,
    sender: mpsc::Sender<v1::AttachConsoleRequest>,
    terminal: bool,
) -> Result<Left, Failure> {
    let told = |what: &str| {
        // In raw mode a line has to be begun and ended.
        let (begin, end) = if terminal { ("\r\n", "\r") } else { ("", "") };
        if !session.ui.quiet() {
            let _ = writeln!(io::stderr(), "{begin}[salvor: {what}]{end}");
        }
    };
    let unusable = |cause| Failure::File {
        what: "cannot wait for signals".to_owned(),
        cause,
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(unusable)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(unusable)?;
    let mut sender = Some(sender);
    let mut keys = keys();
    // Once standard input has ended.
    let mut until: Option<Instant> = None;
    loop {
        let lingers = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = stream.message() => {
                let Some(message) = message? else {
                    return Ok(Left::Ended("the agent ended it".to_owned()));
                };
                if session.ui.is_json() {
                    session.ui.item(&message, |_| String::new())?;
                }
                match message.item {
                    Some(Told::Attached(attached)) => {
                        let how = if attached.writer { "attached" } else { "looking on" };
                        let leave = if terminal { "; Ctrl-] leaves" } else { "" };
                        told(&format!("{how}, {} attached in all{leave}", attached.clients));
                    }
                    Some(Told::Output(bytes)) if !session.ui.is_json() => write(&bytes)?,
                    Some(Told::Output(_)) | None => {}
                    Some(Told::Lost(pieces)) => told(&format!("{pieces} pieces were missed")),
                    Some(Told::TakenOver(by)) => {
                        let by = crate::output::text::clean(&by.caller).into_owned();
                        told(&format!("{by} took over; looking on from now"));
                    }
                    Some(Told::Ended(ended)) => return Ok(Left::Ended(ended.message)),
                }
            }
            typed = keys.recv(), if until.is_none() => {
                let bytes = typed.unwrap_or_default();
                let length = bytes.len();
                let leaves = terminal
                    .then(|| bytes.iter().position(|key| *key == ESCAPE))
                    .flatten();
                let bytes = bytes.get(..leaves.unwrap_or(length)).unwrap_or_default();
                if let Some(sender) = sender.as_ref().filter(|_| !bytes.is_empty() && !args.read_only) {
                    let item = Some(Sent::Input(bytes.to_vec()));
                    // If the agent takes no more, the stream says why.
                    let _ = sender.send(v1::AttachConsoleRequest { item }).await;
                }
                if leaves.is_some() || (length == 0 && terminal) {
                    return Ok(Left::Asked);
                }
                if length == 0 && args.read_only {
                    // Nothing was to come from there: it is looked on until the end.
                    until = Some(Instant::now() + Duration::from_secs(u64::from(u32::MAX)));
                } else if length == 0 {
                    sender = None;
                    until = Some(Instant::now() + args.linger);
                }
            }
            () = lingers => return Ok(Left::Asked),
            _ = terminate.recv() => return Ok(Left::Asked),
            _ = hang_up.recv() => return Ok(Left::Asked),
        }
    }
}

/// What comes from standard input, piece by piece. A thread of its own waits for it, and may still do so
/// when the program ends.
fn keys() -> mpsc::Receiver<Vec<u8>> {
    let (sender, keys) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut piece = vec![0; KEYS];
        // An error is as good as the end.
        while let Ok(length @ 1..) = io::stdin().read(&mut piece) {
            let typed = piece.get(..length).unwrap_or_default().to_vec();
            if sender.blocking_send(typed).is_err() {
                break;
            }
        }
    });
    keys
}

/// `salvor server screenshot`.
pub(super) async fn screenshot(session: &Session, args: ScreenshotArgs) -> Result<(), Failure> {
    let request = v1::GetScreenshotRequest {
        server: args.server,
    };
    let mut consoles = session.agent.consoles();
    let mut stream = consoles.get_screenshot(ask(request)).await?.into_inner();
    let mut size = v1::GetScreenshotResponse::default();
    let mut png = Vec::new();
    while let Some(piece) = stream.message().await? {
        size.width = size.width.max(piece.width);
        size.height = size.height.max(piece.height);
        png.extend(piece.data);
    }
    let failed = |cause| Failure::File {
        what: format!("cannot write {}", args.file.display()),
        cause,
    };
    tokio::fs::write(&args.file, png).await.map_err(failed)?;
    session.ui.result(&size, |size| {
        let file = args.file.display().to_string();
        let file = crate::output::text::clean(&file).into_owned();
        format!("{file}: {} x {} pixels\n", size.width, size.height)
    })
}
