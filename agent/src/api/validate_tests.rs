// SPDX-License-Identifier: Apache-2.0
//! Tests of the rules for fields.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use salvor_proto::v1;

use super::*;

/// What a hostile caller may put into any string.
const HOSTILE: &[&str] = &[
    "a\0b",
    "a\nb",
    "\u{1b}[31mred",
    "\u{202e}gnirts",
    "</name><devices/>",
    "../../etc/passwd",
    "$(reboot)",
    "-rf",
    "%s%n",
];

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn names_are_printable_and_bounded() {
    for good in [
        "a",
        "web 1",
        "Größe",
        "サーバー",
        "a<b>&c",
        &"é".repeat(255),
    ] {
        assert!(name("name", good).is_ok(), "{good}");
    }
    for bad in [
        "",
        " a",
        "a ",
        "a\0",
        "a\n",
        "\u{1b}[0m",
        "\u{202e}",
        &"a".repeat(256),
        &"x".repeat(1 << 20),
    ] {
        let refusal = name("name", bad).unwrap_err();
        assert!(refusal.message.len() < 500);
        assert!(!refusal.message.chars().any(char::is_control));
    }
}

#[test]
fn words_carry_nothing_into_xml_paths_or_command_lines() {
    for hostile in HOSTILE {
        assert!(word("machine", hostile).is_err(), "{hostile}");
    }
    for good in ["pc-q35-7.2", "virtio", "br0", "a_b"] {
        assert!(word("machine", good).is_ok());
    }
}

#[test]
fn request_ids_are_uuids_and_one_whatever_their_case() {
    assert_eq!(request_id("").unwrap(), None);
    let lower = "7f0c1a52-3d9e-4b6f-8a21-5c0e9d7b4f13";
    assert_eq!(
        request_id(&lower.to_uppercase()).unwrap().as_deref(),
        Some(lower)
    );
    for bad in [
        "x",
        "7f0c1a523d9e4b6f8a215c0e9d7b4f13",
        "{7f0c1a52-3d9e-4b6f-8a21-5c0e9d7b4f1}",
    ] {
        assert!(request_id(bad).is_err(), "{bad}");
    }
    assert!(uuid("id", "00000000-0000-0000-0000-000000000000").is_err());
}

#[test]
fn metadata_follows_novas_rules() {
    assert!(metadata("m", map(&[("a-b_c:d.e f", "any value"), ("k", "")])).is_ok());
    for (key, value) in [
        ("", "v"),
        ("k/", "v"),
        ("ключ", "v"),
        ("k", "a\0"),
        ("k", &"v".repeat(256)),
    ] {
        assert!(metadata("m", map(&[(key, value)])).is_err(), "{key}");
    }
    assert!(metadata("m", map(&[(&"k".repeat(256), "v")])).is_err());
    let many: HashMap<_, _> = (0..129).map(|i| (format!("k{i}"), String::new())).collect();
    assert!(metadata("m", many).is_err());
}

#[test]
fn public_keys_are_single_lines() {
    assert!(public_keys("k", map(&[("me", "ssh-ed25519 AAAA me@host")])).is_ok());
    for bad in ["", "ssh-rsa A\nssh-rsa B", "a\0", &"x".repeat(16_385)] {
        assert!(public_keys("k", map(&[("me", bad)])).is_err());
    }
    assert!(public_keys("k", map(&[("a\nb", "ssh-rsa A")])).is_err());
}

#[test]
fn user_data_has_novas_limit() {
    assert_eq!(user_data("u", Vec::new()).unwrap(), None);
    assert!(user_data("u", vec![0; 49_149]).unwrap().is_some());
    assert!(user_data("u", vec![0; 49_150]).is_err());
}

#[test]
fn hostnames_are_labels() {
    for good in ["a", "web-1", "A9", &"a".repeat(63)] {
        assert!(hostname("h", good).is_ok(), "{good}");
    }
    for bad in ["", "-a", "a-", "a.b", "a_b", "é", &"a".repeat(64)]
        .iter()
        .chain(HOSTILE)
    {
        assert!(hostname("h", bad).is_err(), "{bad}");
    }
}

#[test]
fn a_hostname_follows_from_any_name() {
    let id = Uuid::from_u128(1);
    assert_eq!(
        hostname_from("Web Server_1.example", id),
        "web-server-1-example"
    );
    assert_eq!(hostname_from("..größe--", id), "gre");
    assert_eq!(hostname_from("サーバー", id), format!("server-{id}"));
    assert_eq!(hostname_from(&"a".repeat(200), id).len(), 63);
    for text in HOSTILE
        .iter()
        .copied()
        .chain(["", "---", " . ", "a b", &"-a".repeat(90)])
    {
        assert!(hostname("h", &hostname_from(text, id)).is_ok(), "{text:?}");
    }
}

#[test]
fn macs_are_unicast() {
    assert_eq!(mac("m", "52:54:00:AB:cd:01").unwrap(), "52:54:00:ab:cd:01");
    for bad in [
        "",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
        "52:54:00:ab:cd",
        "52:54:00:ab:cd:01:02",
        "52-54-00-ab-cd-01",
        "52:54:00:ab:cd:0g",
        "52:54:00:ab:cd:+1",
    ] {
        assert!(mac("m", bad).is_err(), "{bad}");
    }
}

#[test]
fn an_interface_names_its_connection() {
    use v1::network_interface_spec::Connection;
    let spec = |connection| {
        vec![v1::NetworkInterfaceSpec {
            connection,
            ..v1::NetworkInterfaceSpec::default()
        }]
    };
    let good = interfaces("i", spec(Some(Connection::User(true)))).unwrap();
    assert_eq!(good[0].model, "virtio");
    for bad in [
        None,
        Some(Connection::User(false)),
        Some(Connection::Bridge(String::new())),
        Some(Connection::Network("a'/><x".to_owned())),
    ] {
        assert!(interfaces("i", spec(bad)).is_err());
    }
    assert!(interfaces("i", vec![v1::NetworkInterfaceSpec::default(); 25]).is_err());
}

#[test]
fn flavors_are_bounded() {
    let check = |vcpus, memory_mib, disk_gib| {
        flavor(
            "flavor",
            Some(v1::Flavor {
                vcpus,
                memory_mib,
                disk_gib,
            }),
        )
    };
    assert!(check(1, 16, 0).is_ok());
    assert!(check(512, 16 << 20, 64 << 10).is_ok());
    for (vcpus, memory, disk) in [
        (0, 64, 0),
        (513, 64, 0),
        (1, 15, 0),
        (1, (16 << 20) + 1, 0),
        (1, 64, (64 << 10) + 1),
        (u32::MAX, u64::MAX, u64::MAX),
    ] {
        assert!(check(vcpus, memory, disk).is_err());
    }
    assert!(flavor("flavor", None).is_err());
}

#[test]
fn durations_are_neither_negative_nor_endless() {
    let check = |seconds, nanos| {
        duration(
            "d",
            Some(prost_types::Duration { seconds, nanos }),
            SHUTDOWN,
        )
    };
    assert_eq!(duration("d", None, SHUTDOWN).unwrap(), None);
    assert_eq!(check(0, 0).unwrap(), Some(Duration::ZERO));
    assert_eq!(check(3_600, 0).unwrap(), Some(SHUTDOWN));
    for (seconds, nanos) in [
        (-1, 0),
        (0, -1),
        (0, 1_000_000_000),
        (3_600, 1),
        (i64::MAX, i32::MAX),
        (i64::MIN, i32::MIN),
    ] {
        assert!(check(seconds, nanos).is_err());
    }
}

#[test]
fn page_sizes_have_a_default_and_a_most() {
    assert_eq!(page_size(0).unwrap(), 100);
    assert_eq!(page_size(7).unwrap(), 7);
    assert_eq!(page_size(i32::MAX).unwrap(), 1_000);
    assert!(page_size(-1).is_err());
}
