// SPDX-License-Identifier: Apache-2.0
//! `docs/CONFIGURATION.md`, made from the settings themselves, and the test that it is up to date.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use super::kinds::Kind;
use super::settings::{Config, Setting, Visitor};

const HEAD: &str = "\
<!-- Made from agent/src/config/settings.rs. Change it there, then run:
     UPDATE_DOCS=1 cargo test -p salvor-agent --lib config -->

# Configuration

`salvord` reads one TOML file: the one named with `--config`, else `/etc/salvor/salvor.toml`. If the latter does not
exist, every setting has its default; a file that was named must exist. The file is read once, at start, and checked as
a whole before anything is opened. Every mistake is reported with its line, and an unknown key together with the known
one that is nearest to it:

```
salvor.toml:12: unknown key \"libvirt.url\"; did you mean \"libvirt.uri\"?
```

`salvord check-config` prints the effective configuration and where each value came from: `default`, or the file and
line. What it prints is itself a configuration. Its exit code is 0, or 78 if the configuration is wrong.

Durations are a whole number and one of `ms`, `s`, `m`, `h`, `d`: `\"90s\"`, `\"2h\"`. Sizes are a whole number and one of
`B`, `KiB`, `MiB`, `GiB`, `TiB`. `\"0\"` needs no unit.

## Exit codes of `salvord`

| code | meaning |
|---|---|
| 0 | ended as asked |
| 1 | failed while starting or running; the message says at what |
| 64 | wrong arguments |
| 78 | wrong configuration, templates in `templates_dir` included |
";

struct Page {
    out: String,
}

impl Visitor for Page {
    fn section(&mut self, name: &'static str, help: &'static [&'static str]) {
        let _ = write!(self.out, "\n## `[{name}]`\n\n{}\n", prose(help));
    }

    fn setting<K: Kind>(&mut self, setting: Setting, kind: &K, value: &mut K::Value) {
        let default = kind
            .show(value)
            .map_or_else(|| "not set".to_owned(), |value| format!("`{value}`"));
        let _ = write!(
            self.out,
            "\n### `{}`\n\n{}\n\nDefault: {default}. Write {}.\n",
            setting.name(),
            prose(setting.help),
            kind.rule()
        );
    }
}

fn prose(help: &[&str]) -> String {
    help.iter()
        .map(|line| line.trim())
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn the_reference_page_is_what_the_settings_say() {
    let mut page = Page {
        out: format!("{HEAD}\n## At the top\n"),
    };
    Config::default().visit(&mut page);

    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/CONFIGURATION.md");
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&file, &page.out).unwrap();
    }
    let written = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        written == page.out,
        "docs/CONFIGURATION.md is stale: run UPDATE_DOCS=1 cargo test -p salvor-agent --lib config"
    );
}
