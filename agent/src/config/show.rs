// SPDX-License-Identifier: Apache-2.0
//! What `salvord check-config` prints: the effective configuration as TOML, with the place that each value came from.

use std::fmt::Write as _;

use super::Loaded;
use super::kinds::Kind;
use super::settings::{Setting, Visitor};

/// The column at which the places stand, unless a value is longer.
const PLACE_COLUMN: usize = 48;

impl Loaded {
    /// Every setting with its value and where it came from. The text is itself a configuration.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut printer = Printer {
            loaded: self,
            out: String::new(),
        };
        self.config.clone().visit(&mut printer);
        printer.out
    }

    /// `default`, or the file and line.
    fn place(&self, name: &str) -> String {
        match (&self.path, self.origins.get(name)) {
            // A path may hold anything, and this is a comment of one line.
            (Some(path), Some(line)) => {
                format!("{}:{line}", path.to_string_lossy().escape_debug())
            }
            _ => "default".to_owned(),
        }
    }
}

struct Printer<'a> {
    loaded: &'a Loaded,
    out: String,
}

impl Visitor for Printer<'_> {
    fn section(&mut self, name: &'static str, _help: &'static [&'static str]) {
        // Writing to a String cannot fail.
        let _ = write!(self.out, "\n[{name}]\n");
    }

    fn setting<K: Kind>(&mut self, setting: Setting, kind: &K, value: &mut K::Value) {
        let key = setting.key;
        let line = kind.show(value).map_or_else(
            || format!("# {key} is not set"),
            |value| format!("{key} = {value}"),
        );
        let place = self.loaded.place(&setting.name());
        let _ = writeln!(self.out, "{line:PLACE_COLUMN$} # {place}");
    }
}
