// SPDX-License-Identifier: Apache-2.0
//! Tables and `key: value` blocks. Every cell is cleaned here, so that no caller can forget to.

use super::text::{clean, pad, width};

/// Blanks between two columns.
const GAP: &str = "  ";

/// Rows under a header line, aligned, without rules around them.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    pub(crate) fn new(header: &[&str]) -> Self {
        Self {
            rows: vec![header.iter().map(|&name| name.to_owned()).collect()],
        }
    }

    /// Adds a row. An empty cell is shown as `-`, so that columns can be counted.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        let shown = |cell: String| {
            if cell.is_empty() {
                "-".to_owned()
            } else {
                cell
            }
        };
        self.rows.push(cells.into_iter().map(shown).collect());
    }

    /// The lines, each ended.
    pub(crate) fn render(&self) -> String {
        let mut widths: Vec<usize> = Vec::new();
        for row in &self.rows {
            for (column, cell) in row.iter().enumerate() {
                let needed = width(&clean(cell));
                match widths.get_mut(column) {
                    Some(widest) => *widest = needed.max(*widest),
                    None => widths.push(needed),
                }
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, &columns)| pad(cell, columns))
                .collect();
            text.push_str(cells.join(GAP).trim_end());
            text.push('\n');
        }
        text
    }
}

/// A block of `key: value` lines with the values aligned. Absent values are left out.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    lines: Vec<(String, String)>,
}

impl Fields {
    /// An empty block.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a line, unless the value is empty.
    pub(crate) fn add(&mut self, key: &str, value: impl Into<String>) -> &mut Self {
        let value = value.into();
        if !value.is_empty() {
            self.lines.push((key.to_owned(), value));
        }
        self
    }

    /// The lines, each ended.
    pub(crate) fn render(&self) -> String {
        let widest = self
            .lines
            .iter()
            .map(|(key, _)| width(&clean(key)) + 1)
            .max()
            .unwrap_or(0);
        let mut text = String::new();
        let mut above = "";
        for (key, value) in &self.lines {
            // A key that repeats is a list: it is written once.
            let shown = if key == above {
                String::new()
            } else {
                format!("{key}:")
            };
            text.push_str(&pad(&shown, widest));
            text.push_str(GAP);
            text.push_str(&clean(value));
            text.push('\n');
            above = key;
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_what_is_shown() {
        let mut table = Table::new(&["NAME", "STATUS", "NOTE"]);
        table.row(["東京".to_owned(), "ACTIVE".to_owned(), String::new()]);
        table.row(["a\x1b[2J".to_owned(), "SHUTOFF".to_owned(), "x".to_owned()]);
        assert_eq!(
            table.render(),
            "NAME        STATUS   NOTE\n\
             東京        ACTIVE   -\n\
             a\\u{1b}[2J  SHUTOFF  x\n"
        );
    }

    #[test]
    fn a_repeated_key_is_written_once_and_an_empty_value_not_at_all() {
        let mut fields = Fields::new();
        fields
            .add("id", "1")
            .add("disk", "vda")
            .add("disk", "vdb")
            .add("none", "");
        assert_eq!(fields.render(), "id:    1\ndisk:  vda\n       vdb\n");
    }
}
