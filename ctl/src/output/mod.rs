// SPDX-License-Identifier: Apache-2.0
//! Where the program writes: results on standard output, everything else on standard error.

pub(crate) mod diagnostics;
pub(crate) mod guest;
pub(crate) mod json;
pub(crate) mod show;
pub(crate) mod table;
pub(crate) mod text;

use std::io::{self, IsTerminal as _, Write as _};

use prost::{Message, Name};

use crate::{
    cli::{Format, Global},
    errors::Failure,
};

/// How to write.
#[derive(Debug)]
pub(crate) struct Ui {
    /// Present if results are JSON.
    json: Option<json::Json>,
    quiet: bool,
    colour: bool,
}

impl Ui {
    /// What the arguments, the environment and the terminals ask for.
    ///
    /// # Errors
    /// [`Failure::Json`] if the built-in descriptors are unusable.
    pub(crate) fn new(global: &Global) -> Result<Self, Failure> {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Ok(Self {
            json: match global.output {
                Format::Json => Some(json::Json::new()?),
                Format::Table => None,
            },
            quiet: global.quiet,
            colour: io::stdout().is_terminal() && !dumb && !set("NO_COLOR"),
        })
    }

    /// Are results JSON?
    pub(crate) fn is_json(&self) -> bool {
        self.json.is_some()
    }

    /// May results be coloured?
    pub(crate) fn colour(&self) -> bool {
        self.colour
    }

    /// Shall only results and errors be written?
    pub(crate) fn quiet(&self) -> bool {
        self.quiet
    }

    /// Can lines on standard error be drawn over?
    pub(crate) fn live(&self) -> bool {
        !self.quiet
            && io::stderr().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
    }

    /// Writes a result: the message as JSON, or else `text`.
    ///
    /// # Errors
    /// [`Failure::Output`] if standard output is gone, [`Failure::Json`].
    pub(crate) fn result<M: Message + Name>(
        &self,
        message: &M,
        text: impl FnOnce(&M) -> String,
    ) -> Result<(), Failure> {
        match &self.json {
            Some(json) => self.text(&(json.write(message, false)? + "\n")),
            None => self.text(&text(message)),
        }
    }

    /// Writes one result of a stream: a line of JSON, or else `text`.
    ///
    /// # Errors
    /// As [`Self::result`].
    pub(crate) fn item<M: Message + Name>(
        &self,
        message: &M,
        text: impl FnOnce(&M) -> String,
    ) -> Result<(), Failure> {
        match &self.json {
            Some(json) => self.text(&(json.write(message, true)? + "\n")),
            None => self.text(&text(message)),
        }
    }

    /// Writes text, which must be clean, to standard output.
    ///
    /// # Errors
    /// [`Failure::Output`] if standard output is gone.
    pub(crate) fn text(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .map_err(Failure::Output)
    }

    /// Tells something on standard error, unless the program is to be quiet.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            warn(text);
        }
    }

    /// As [`Self::note`], where no bar is drawn that shows it anyway.
    pub(crate) fn note_unless_live(&self, text: &str) {
        if !self.live() {
            self.note(text);
        }
    }
}

/// Tells something on standard error, cleaned.
pub(crate) fn warn(text: &str) {
    // With standard error gone there is nobody to tell.
    let _ = writeln!(io::stderr(), "{}", text::clean(text));
}
