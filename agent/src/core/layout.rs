// SPDX-License-Identifier: Apache-2.0
//! Where things are in the state folder. Every path follows from ids, never from a clock or chance,
//! so that a step done twice is done once.
//!
//! ```text
//! <state_dir>/images/<image>.<format>
//! <state_dir>/servers/<server>/disk
//!                              disk.config
//!                              nvram.fd
//!                              console.log
//!                              dumps/<operation>/memory.elf
//!                              rescue/<operation>/disk
//!                                                 disk.config
//!                                                 nvram.fd
//!                                                 <target>.overlay
//!                                                 owners
//! <state_dir>/console/<server>.json
//! ```

use uuid::Uuid;

use super::image::ImageFormat;

/// The state folder of this agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    state_dir: String,
}

impl Layout {
    /// The layout under `state_dir`, an absolute path.
    #[must_use]
    pub fn new(state_dir: impl Into<String>) -> Self {
        let mut state_dir = state_dir.into();
        while state_dir.ends_with('/') {
            state_dir.pop();
        }
        Self { state_dir }
    }

    /// The state folder itself.
    #[must_use]
    pub fn state_dir(&self) -> &str {
        &self.state_dir
    }

    /// The image store.
    #[must_use]
    pub fn images(&self) -> String {
        format!("{}/images", self.state_dir)
    }

    /// The file of an image.
    #[must_use]
    pub fn image(&self, image: Uuid, format: ImageFormat) -> String {
        format!("{}/{image}.{format}", self.images())
    }

    /// The folders of all servers.
    #[must_use]
    pub fn servers(&self) -> String {
        format!("{}/servers", self.state_dir)
    }

    /// The folder of one server.
    #[must_use]
    pub fn server(&self, server: Uuid) -> String {
        format!("{}/{server}", self.servers())
    }

    /// The root disk of a created server.
    #[must_use]
    pub fn disk(&self, server: Uuid) -> String {
        format!("{}/disk", self.server(server))
    }

    /// The config drive of a created server.
    #[must_use]
    pub fn config_drive(&self, server: Uuid) -> String {
        format!("{}/disk.config", self.server(server))
    }

    /// The UEFI variables of a created server.
    #[must_use]
    pub fn nvram(&self, server: Uuid) -> String {
        format!("{}/nvram.fd", self.server(server))
    }

    /// The console log of a created server.
    #[must_use]
    pub fn console_log(&self, server: Uuid) -> String {
        format!("{}/console.log", self.server(server))
    }

    /// The folder of the notes about console logs.
    #[must_use]
    pub fn consoles(&self) -> String {
        format!("{}/console", self.state_dir)
    }

    /// The note of where each boot of a server begins in its console log.
    #[must_use]
    pub fn console_boots(&self, server: Uuid) -> String {
        format!("{}/{server}.json", self.consoles())
    }

    /// The folder of all rescues of a server.
    #[must_use]
    pub fn rescues(&self, server: Uuid) -> String {
        format!("{}/rescue", self.server(server))
    }

    /// The folder of one rescue.
    #[must_use]
    pub fn rescue(&self, server: Uuid, plan: Uuid) -> String {
        format!("{}/{plan}", self.rescues(server))
    }

    /// The folder of a server's memory dumps.
    #[must_use]
    pub fn dumps(&self, server: Uuid) -> String {
        format!("{}/dumps", self.server(server))
    }

    /// The folder of one memory dump: its own, so that taking it back takes no other with it.
    #[must_use]
    pub fn dump(&self, server: Uuid, plan: Uuid) -> String {
        format!("{}/{plan}", self.dumps(server))
    }
}
