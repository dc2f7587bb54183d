// SPDX-License-Identifier: Apache-2.0
//! From a TOML text to a [`Config`]: reads every setting, notes where each came from, and finds every mistake at once.

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::kinds::{Kind, ValueError};
use super::settings::{Config, Setting, Visitor};
use super::{ConfigError, Loaded, Problem};

impl Config {
    /// Reads a configuration from `text`; `path` is what messages call it.
    ///
    /// # Errors
    /// Every mistake in the text, in the order of its lines.
    pub fn parse(text: &str, path: &Path) -> Result<Loaded, ConfigError> {
        // An editor's byte order mark is not part of the text.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut problems: Vec<Problem> = errors
            .into_iter()
            .map(|error| Problem {
                line: line_of(text, error.span().map_or(0, |span| span.start)),
                text: error.message().to_owned(),
            })
            .collect();

        let mut config = Self::default();
        let mut origins = BTreeMap::new();
        // Half a table would only bring consequential errors.
        if problems.is_empty() {
            let mut reader = Reader::new(text, table.get_ref());
            config.visit(&mut reader);
            reader.find_unknown();
            problems = reader.problems;
            origins = reader.origins;
        }
        if problems.is_empty() {
            return Ok(Loaded {
                config,
                path: Some(path.to_path_buf()),
                origins,
            });
        }
        problems.sort_by_key(|problem| problem.line);
        Err(ConfigError::Invalid {
            path: path.to_path_buf(),
            problems,
        })
    }
}

/// The line, counted from one, that the byte at `offset` stands in.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text
        .bytes()
        .take(offset)
        .filter(|byte| *byte == b'\n')
        .count()
}

struct Reader<'t> {
    text: &'t str,
    table: &'t DeTable<'t>,
    sections: Vec<&'static str>,
    settings: Vec<Setting>,
    origins: BTreeMap<String, usize>,
    problems: Vec<Problem>,
}

impl Visitor for Reader<'_> {
    fn section(&mut self, name: &'static str, _help: &'static [&'static str]) {
        self.sections.push(name);
    }

    fn setting<K: Kind>(&mut self, setting: Setting, kind: &K, value: &mut K::Value) {
        self.settings.push(setting);
        let table = if setting.section.is_empty() {
            Some(self.table)
        } else {
            self.table
                .get(setting.section)
                .and_then(|section| section.get_ref().as_table())
        };
        let Some((key, found)) = table.and_then(|table| table.get_key_value(setting.key)) else {
            return;
        };
        let line = line_of(self.text, key.span().start);
        match kind.read(found.get_ref()) {
            Ok(read) => {
                *value = read;
                self.origins.insert(setting.name(), line);
            }
            Err(error) => {
                let name = setting.name();
                let text = format!("{name}: {error}; {}", advice(&error, kind));
                self.problems.push(Problem { line, text });
            }
        }
    }
}

/// What to write instead.
fn advice<K: Kind>(error: &ValueError, kind: &K) -> String {
    match error {
        ValueError::Tcp { .. } => "write \"unix:/path/of/the/socket\"".to_owned(),
        _ => format!("write {}", kind.rule()),
    }
}

impl<'t> Reader<'t> {
    fn new(text: &'t str, table: &'t DeTable<'t>) -> Self {
        Self {
            text,
            table,
            sections: Vec::new(),
            settings: Vec::new(),
            origins: BTreeMap::new(),
            problems: Vec::new(),
        }
    }

    /// Complains about everything in the file that no setting was read from.
    fn find_unknown(&mut self) {
        for (key, value) in self.table {
            let name: &str = key.get_ref();
            let line = line_of(self.text, key.span().start);
            let is_section = self.sections.contains(&name);
            match value.get_ref() {
                DeValue::Table(section) if is_section => {
                    for key in section.keys() {
                        let sub: &str = key.get_ref();
                        if !self.knows(name, sub) {
                            let line = line_of(self.text, key.span().start);
                            self.unknown("key", &format!("{name}.{sub}"), line);
                        }
                    }
                }
                other if is_section => self.problems.push(Problem {
                    line,
                    text: format!(
                        "{name}: table expected, found {}; write [{name}] and its keys below",
                        other.type_str()
                    ),
                }),
                DeValue::Table(_) if !self.knows("", name) => self.unknown("section", name, line),
                _ if !self.knows("", name) => self.unknown("key", name, line),
                _ => {}
            }
        }
    }

    fn knows(&self, section: &str, key: &str) -> bool {
        self.settings
            .iter()
            .any(|known| known.section == section && known.key == key)
    }

    /// What there is where an unknown name stands.
    fn known_beside(&self, name: &str) -> String {
        let section = name.split_once('.').map_or("", |(section, _)| section);
        let keys: Vec<&str> = self
            .settings
            .iter()
            .filter(|known| known.section == section)
            .map(|known| known.key)
            .collect();
        let keys = keys.join(", ");
        if section.is_empty() {
            let sections = self.sections.join(", ");
            format!("outside of sections there are {keys}; the sections are {sections}")
        } else {
            format!("[{section}] has {keys}")
        }
    }

    fn unknown(&mut self, what: &str, name: &str, line: usize) {
        let nearest = if what == "section" {
            nearest(name, self.sections.iter().map(ToString::to_string))
        } else {
            nearest(name, self.settings.iter().map(Setting::name))
        };
        let hint = nearest.map_or_else(
            || self.known_beside(name),
            |nearest| format!("did you mean {nearest:?}?"),
        );
        self.problems.push(Problem {
            line,
            text: format!("unknown {what} {name:?}; {hint}"),
        });
    }
}

/// The known name that `name` was probably meant to be: the one that is fewest typing mistakes away, at most two or a
/// third of its length; else one that is the same but for its section.
fn nearest(name: &str, known: impl Iterator<Item = String>) -> Option<String> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let allowed = (name.chars().count() / 3).max(2);
    known
        .filter_map(|candidate| {
            let distance = strsim::damerau_levenshtein(name, &candidate);
            if distance <= allowed {
                Some((distance, candidate))
            } else {
                (last(name) == last(&candidate)).then_some((allowed + 1, candidate))
            }
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}
