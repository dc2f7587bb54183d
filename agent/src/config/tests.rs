// SPDX-License-Identifier: Apache-2.0
//! The rules of the configuration, setting by setting and mistake by mistake.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::kinds::Kind;
use super::settings::{Setting, Visitor};
use super::*;

fn parse(text: &str) -> Result<Config, Vec<String>> {
    match Config::parse(text, Path::new("salvor.toml")) {
        Ok(loaded) => Ok(loaded.config),
        Err(ConfigError::Invalid { path, problems }) => Err(list(&path, &problems)
            .lines()
            .map(ToOwned::to_owned)
            .collect()),
        Err(other) => panic!("{other}"),
    }
}

/// The single mistake in `text`.
fn mistake(text: &str) -> String {
    let mistakes = parse(text).unwrap_err();
    assert_eq!(mistakes.len(), 1, "{mistakes:?}");
    mistakes.into_iter().next().unwrap()
}

#[test]
fn an_empty_file_is_the_defaults() {
    let config = parse("# nothing\n").unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.state_dir, PathBuf::from("/var/lib/salvor"));
    assert_eq!(config.listen, PathBuf::from("/run/salvor/salvor.sock"));
    assert_eq!(config.socket_mode, 0o660);
    assert_eq!(config.rescue.timeout, None);
    assert_eq!(config.shutdown.timeout, Duration::from_secs(60));
    assert_eq!(config.operations.keep, Duration::from_secs(30 * 24 * 3600));
    assert_eq!(config.storage.max_image_size.bytes(), 64 << 30);
}

/// Writes every setting of a configuration as `section.key = value` and reads it back with the setting's own kind.
struct RoundTrip {
    seen: usize,
}

impl Visitor for RoundTrip {
    fn section(&mut self, _name: &'static str, _help: &'static [&'static str]) {}

    fn setting<K: Kind>(&mut self, setting: Setting, kind: &K, value: &mut K::Value) {
        self.seen += 1;
        assert!(!kind.rule().is_empty());
        assert!(setting.help.iter().all(|line| !line.trim().is_empty()));
        if let Some(shown) = kind.show(value) {
            let name = setting.name();
            let parsed = toml::de::DeValue::parse(&shown).unwrap();
            let read = kind.read(parsed.get_ref());
            assert_eq!(
                read.unwrap_or_else(|error| panic!("{name}: {error}")),
                *value,
                "{name}"
            );
        }
    }
}

/// The number of settings.
fn round_trip(mut config: Config) -> usize {
    let mut visitor = RoundTrip { seen: 0 };
    config.visit(&mut visitor);
    visitor.seen
}

#[test]
fn every_default_obeys_its_own_rule_and_is_read_back_as_shown() {
    assert!(round_trip(Config::default()) > 0);
}

const EVERYTHING: &str = r#"
state_dir = "/srv/salvor"
listen = "unix:/run/s.sock"
socket_mode = "0600"
socket_group = "libvirt"
virt_type = "qemu"
templates_dir = "/etc/salvor/templates"
import_dirs = ["/srv/images", "/mnt/more"]
libvirt.uri = "qemu+unix:///system?socket=/run/l.sock"
libvirt.definitions = "/var/lib/libvirt/qemu"
libvirt.saved_memory = "/var/lib/libvirt/memory"
libvirt.call_timeout = "10s"
libvirt.start_timeout = "5m"
libvirt.destroy_timeout = "90s"
libvirt.keepalive_interval = "2s"
libvirt.keepalive_count = 0x5
libvirt.resync_interval = "1h"
[rescue]
default_image = "rescue-13"
timeout = "2h"
[shutdown]
timeout = "0"
retry_interval = "1s"
[delete]
reclaim_interval = "7d"
[storage]
reserve = "0"
max_image_size = "1TiB"
qemu_img_memory = "512MiB"
[console]
boots = 3
max_size = "1MiB"
[api]
reflection = false
[events]
keep = 5_000
[operations]
keep = "7d"
[policy]
crashed = "start"
stopped_by_itself = "start"
[autostart]
enabled = true
parallel = 4
delay = "10s"
[log]
format = "json"
level = "debug"
[drain]
timeout = "500ms"
"#;

#[test]
fn every_setting_can_be_set() {
    let loaded = Config::parse(EVERYTHING, Path::new("x.toml")).unwrap();
    assert_eq!(
        loaded.origins.len(),
        round_trip(loaded.config.clone()),
        "{:?}",
        loaded.origins
    );
    let config = loaded.config;
    assert_eq!(config.virt_type, VirtType::Qemu);
    assert_eq!(config.import_dirs.len(), 2);
    assert_eq!(config.libvirt.keepalive_count, 5);
    assert_eq!(config.rescue.default_image.as_deref(), Some("rescue-13"));
    assert_eq!(config.rescue.timeout, Some(Duration::from_secs(7200)));
    assert_eq!(
        config.delete.reclaim_interval,
        Duration::from_secs(7 * 86_400)
    );
    assert_eq!(config.shutdown.timeout, Duration::ZERO);
    assert_eq!(config.storage.reserve.bytes(), 0);
    assert!(!config.api.reflection);
    assert_eq!(config.events.keep, 5000);
    assert_eq!(config.policy.crashed, Reaction::Start);
    assert!(config.autostart.enabled);
    assert_eq!(config.autostart.parallel, 4);
    assert_eq!(config.autostart.delay, Duration::from_secs(10));
    assert_eq!(config.policy.stopped_by_itself, Reaction::Start);
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.drain.timeout, Duration::from_millis(500));
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_known_one() {
    assert_eq!(
        mistake("\n\n[libvirt]\n# comment\nurl = \"qemu:///system\"\n"),
        "salvor.toml:5: unknown key \"libvirt.url\"; did you mean \"libvirt.uri\"?"
    );
    for (text, hint) in [
        ("state-dir = \"/x\"", "did you mean \"state_dir\"?"),
        ("statedir = \"/x\"", "did you mean \"state_dir\"?"),
        ("sokcet_mode = \"0660\"", "did you mean \"socket_mode\"?"),
        (
            "libvirt.timeout = \"1s\"",
            "did you mean \"libvirt.call_timeout\"?",
        ),
        // In the wrong section.
        ("uri = \"qemu:///system\"", "did you mean \"libvirt.uri\"?"),
        (
            "[libvirt]\nstate_dir = \"/x\"",
            "did you mean \"state_dir\"?",
        ),
        (
            "[storage]\nretry_interval = \"1s\"",
            "did you mean \"shutdown.retry_interval\"?",
        ),
        (
            "frobnicate_everything = 1",
            "\"frobnicate_everything\"; outside of sections there are state_dir, ",
        ),
        ("frobnicate_everything = 1", "; the sections are libvirt, "),
        (
            "[rescue]\nfrobnicate_everything = 1",
            "unknown key \"rescue.frobnicate_everything\"; [rescue] has default_image, timeout",
        ),
        (
            "[frobnicate_everything]",
            "unknown section \"frobnicate_everything\"; outside of sections there are ",
        ),
        (
            "[libvrit]\nuri = \"qemu:///system\"",
            "unknown section \"libvrit\"; did you mean \"libvirt\"?",
        ),
        ("[[rescues]]", "unknown key \"rescues\""),
    ] {
        let mistake = mistake(text);
        assert!(mistake.contains(hint), "{text}: {mistake}");
    }
}

#[test]
fn hostile_keys_do_not_break_the_line_of_the_message() {
    let mistake = mistake("\"a\\nb\\u001b[31m\" = 1");
    assert!(!mistake.contains(['\n', '\u{1b}']), "{mistake:?}");
}

#[test]
fn all_mistakes_are_reported_at_once_and_in_order() {
    let mistakes = parse(
        "colour = 1\nvirt_type = \"xen\"\n[libvirt]\nuri = 7\nurl = 1\n[shutdown]\nretry_interval = \"0\"\n",
    )
    .unwrap_err();
    let lines: Vec<&str> = mistakes
        .iter()
        .filter_map(|m| m.split(':').nth(1))
        .collect();
    assert_eq!(lines, ["1", "2", "4", "5", "7"], "{mistakes:?}");
}

#[test]
fn wrong_values_are_named_with_what_would_be_right() {
    for (text, parts) in [
        (
            "listen = \"tcp:0.0.0.0:1\"",
            vec!["listen:", "mutual TLS", "unix:/"],
        ),
        ("listen = \"127.0.0.1:8443\"", vec!["mutual TLS"]),
        (
            "listen = \"/run/salvor.sock\"",
            vec!["another form", "\"unix:\""],
        ),
        ("listen = \"unix:salvor.sock\"", vec!["absolute"]),
        ("listen = \"unix:/\"", vec!["another form"]),
        ("socket_mode = \"0666\"", vec!["0660"]),
        (
            "socket_mode = 0o660",
            vec!["string expected, found integer"],
        ),
        ("state_dir = \"var/lib\"", vec!["absolute"]),
        ("state_dir = \"/var/../etc\"", vec!["without \"..\""]),
        ("state_dir = \"/var/\\u0000\"", vec!["absolute"]),
        (
            "import_dirs = \"/srv\"",
            vec!["list expected, found string"],
        ),
        (
            "import_dirs = [\"/srv\", 1]",
            vec!["string expected, found integer"],
        ),
        ("virt_type = \"KVM\"", vec!["\"auto\", \"kvm\", \"qemu\""]),
        (
            "libvirt = \"qemu:///system\"",
            vec!["table expected, found string", "[libvirt]"],
        ),
        (
            "libvirt.uri = \"qemu+ssh://host/system\"",
            vec!["this host"],
        ),
        ("libvirt.uri = \"qemu:///sys tem\"", vec!["another form"]),
        (
            "libvirt.call_timeout = 30",
            vec!["string expected, found integer", "\"30s\""],
        ),
        ("libvirt.call_timeout = \"30\"", vec!["unit must be one of"]),
        (
            "libvirt.call_timeout = \"1ms\"",
            vec!["out of range", "from 100ms"],
        ),
        ("libvirt.keepalive_count = -1", vec!["-1 is out of range"]),
        (
            "libvirt.keepalive_count = 99999999999999999999",
            vec!["out of range"],
        ),
        (
            "libvirt.keepalive_count = 1.5",
            vec!["whole number expected, found float"],
        ),
        ("shutdown.retry_interval = \"999ms\"", vec!["from 1s"]),
        ("storage.reserve = \"1GB\"", vec!["B, KiB, MiB, GiB, TiB"]),
        ("rescue.default_image = \"\"", vec!["1 to 255"]),
        ("rescue.timeout = \"1ms\"", vec!["\"0\" for never"]),
        ("api.reflection = \"yes\"", vec!["true or false"]),
    ] {
        let mistake = mistake(text);
        for part in parts {
            assert!(mistake.contains(part), "{text}: {mistake}");
        }
    }
}

#[test]
fn a_socket_path_has_room_for_the_name_it_is_bound_under() {
    let path = |length: usize| format!("listen = \"unix:/{}\"", "x".repeat(length - 1));
    assert!(parse(&path(102)).is_ok());
    assert!(mistake(&path(103)).contains("103 bytes long"));
}

#[test]
fn broken_toml_is_reported_with_its_line() {
    assert!(mistake("state_dir = \"/x\"\n[libvirt\n").starts_with("salvor.toml:2: "));
    let twice = mistake("state_dir = \"/x\"\nstate_dir = \"/y\"\n");
    assert!(twice.starts_with("salvor.toml:2: "), "{twice}");
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_are_no_mistake() {
    let config = parse("\u{feff}virt_type = \"kvm\"\r\n[drain]\r\ntimeout = \"1s\"\r\n").unwrap();
    assert_eq!(config.virt_type, VirtType::Kvm);
}

#[test]
fn what_check_config_prints_is_the_same_configuration() {
    for text in ["", EVERYTHING] {
        let loaded = Config::parse(text, Path::new("/etc/salvor/salvor.toml")).unwrap();
        let described = loaded.describe();
        assert_eq!(parse(&described).unwrap(), loaded.config, "{described}");
    }
}

#[test]
fn check_config_says_where_each_value_came_from() {
    let text = "virt_type = \"kvm\"\n\n[rescue]\ntimeout = \"1h\"\n";
    let described = Config::parse(text, Path::new("/a/b\n.toml"))
        .unwrap()
        .describe();
    let line = |start: &str| {
        described
            .lines()
            .find(|line| line.starts_with(start))
            .unwrap()
    };
    assert!(line("virt_type").ends_with(" # /a/b\\n.toml:1"));
    assert!(line("timeout = \"1h\"").ends_with(" # /a/b\\n.toml:4"));
    assert!(line("state_dir").ends_with(" # default"));
    assert!(line("# templates_dir is not set").ends_with(" # default"));
}

#[test]
fn files_that_cannot_be_read_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing.toml");
    assert!(matches!(
        Config::load(&missing),
        Err(ConfigError::Read { .. })
    ));

    let latin = dir.path().join("latin.toml");
    fs::write(&latin, b"# caf\xe9\n").unwrap();
    assert!(matches!(
        Config::load(&latin),
        Err(ConfigError::Read { .. })
    ));

    let huge = dir.path().join("huge.toml");
    fs::write(&huge, "#".repeat((1 << 20) + 1)).unwrap();
    assert!(matches!(
        Config::load(&huge),
        Err(ConfigError::TooLarge { .. })
    ));
}
