// SPDX-License-Identifier: Apache-2.0
//! Consoles: the log of a server's serial port over several boots, the port itself with several
//! clients, and pictures of the screen.
//!
//! ```text
//!  boots.rs   which boot began where in the log      <── noted by the step that starts a guest
//!  pieces.rs  boots and files -> pieces, cursors     pure
//!  files.rs   the log's files, virtlogd's rotated ones too
//!  log.rs     reads, follows, trims
//!  port.rs    one line to each port, fanned out to its clients
//!  picture.rs pictures as PNG                        pure
//! ```
//!
//! Whatever a guest wrote is bytes here and never interpreted. Nothing here changes a server, and
//! nothing knows plans or gRPC.

mod boots;
mod files;
mod log;
mod picture;
mod pieces;
mod port;

pub use boots::{Boot, BootNotes};
pub use log::{From, LogRead, LogRequest, Logs, Whose};
pub use picture::{Picture, PictureError, png};
pub use pieces::{BadCursor, Cursor, Shown};
pub use port::{Attached, Client, Heard, Ports, Wish};

/// How much of what guests say is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Boots of a server.
    pub boots: u32,
    /// Bytes of a server's log, all boots together.
    pub bytes: u64,
}
