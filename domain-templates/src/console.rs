// SPDX-License-Identifier: Apache-2.0
//! What a domain shows and says: its serial port with the log of it, and its screen.
//!
//! Does not know: who reads the log, and whether a guest runs.

use crate::domain::Domain;
use crate::xml::Element;

/// The file that keeps what a guest writes on its console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleLog {
    /// The file.
    pub path: String,
    /// Is it added to at a start? If not, a start begins it anew, and what earlier boots said is lost.
    pub append: bool,
}

impl Domain {
    /// The log of the first serial port, or else of the first console, that has one.
    pub fn console_log(&self) -> Option<ConsoleLog> {
        self.ports().find_map(|port| {
            let log = port.child("log")?;
            let path = log.attribute("file").filter(|path| !path.is_empty())?;
            Some(ConsoleLog {
                path: path.to_owned(),
                append: log.attribute("append") == Some("on"),
            })
        })
    }

    /// Is there a serial port or console that somebody can be connected with?
    pub fn has_console(&self) -> bool {
        self.ports().next().is_some()
    }

    /// Is there a screen?
    pub fn has_screen(&self) -> bool {
        self.devices()
            .filter(|device| device.name == "video")
            .filter_map(|video| video.child("model")?.attribute("type"))
            .any(|model| model != "none")
    }

    /// Serial ports first: where there is one, libvirt shows it a second time as a console.
    fn ports(&self) -> impl Iterator<Item = &Element> {
        let named = |name: &'static str| self.devices().filter(move |device| device.name == name);
        named("serial").chain(named("console"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn with(devices: &str) -> Domain {
        let xml = format!("<domain><name>d</name><devices>{devices}</devices></domain>");
        Domain::parse(&xml).unwrap()
    }

    #[test]
    fn the_log_is_that_of_the_first_port_that_has_one() {
        let log = |path: &str, append| {
            let path = path.to_owned();
            Some(ConsoleLog { path, append })
        };
        assert_eq!(with("").console_log(), None);
        assert_eq!(with("<serial type='pty'/>").console_log(), None);
        assert_eq!(with("<serial><log file=''/></serial>").console_log(), None);
        let both =
            "<console><log file='/c'/></console><serial><log file='/s' append='on'/></serial>";
        assert_eq!(with(both).console_log(), log("/s", true));
        let off = "<serial/><serial><log file='/s' append='off'/></serial>";
        assert_eq!(with(off).console_log(), log("/s", false));
        assert_eq!(
            with("<console><log file='/c'/></console>").console_log(),
            log("/c", false)
        );
    }

    #[test]
    fn a_screen_is_a_video_device_that_is_one() {
        assert!(!with("").has_screen());
        assert!(!with("<video><model type='none'/></video>").has_screen());
        assert!(with("<video><model type='vga'/></video>").has_screen());
        assert!(!with("").has_console() && with("<console type='pty'/>").has_console());
    }
}
