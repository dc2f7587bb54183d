// SPDX-License-Identifier: Apache-2.0
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;

use fatfs::{FileSystem, FsOptions};
use serde_json::Value;

use super::*;
use crate::core::password::CryptHash;

const HASH: &str = "$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1";

fn drive() -> ConfigDriveSpec {
    ConfigDriveSpec {
        instance_id: "1d2c3b4a-0000-4000-8000-123456789abc".parse().unwrap(),
        hostname: "web-1".to_owned(),
        name: "Web \"1\" \u{1f980}".to_owned(),
        public_keys: [("laptop".to_owned(), "ssh-ed25519 AAAA me@laptop".to_owned())].into(),
        password: Some(CryptHash(HASH.to_owned())),
        user_data: Some(b"#!/bin/sh\necho \xff\n".to_vec()),
        metadata: [("role".to_owned(), "db: {x}\n".to_owned())].into(),
        password_user: "root".to_owned(),
    }
}

fn build(drive: &ConfigDriveSpec, dir: &Path) -> PathBuf {
    let path = dir.join("disk.config");
    super::build(&path, drive).unwrap();
    path
}

fn read(path: &Path, name: &str) -> Vec<u8> {
    let volume = FileSystem::new(
        fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap(),
        FsOptions::new(),
    )
    .unwrap();
    let mut bytes = Vec::new();
    volume
        .root_dir()
        .open_file(name)
        .unwrap()
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

fn json(path: &Path, name: &str) -> Value {
    serde_json::from_slice(&read(path, name)).unwrap()
}

#[test]
fn the_drive_tells_who_the_guest_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = build(&drive(), dir.path());
    for version in ["latest", "2012-08-10", "2025-04-04"] {
        let metadata = json(&path, &format!("openstack/{version}/meta_data.json"));
        assert_eq!(metadata["uuid"], "1d2c3b4a-0000-4000-8000-123456789abc");
        assert_eq!(metadata["hostname"], "web-1");
        assert_eq!(metadata["name"], "Web \"1\" \u{1f980}");
        assert_eq!(metadata["meta"]["role"], "db: {x}\n");
        assert_eq!(
            metadata["public_keys"]["laptop"],
            "ssh-ed25519 AAAA me@laptop"
        );
        assert_eq!(metadata["keys"][0]["type"], "ssh");
        let user_data = read(&path, &format!("openstack/{version}/user_data"));
        assert_eq!(user_data, b"#!/bin/sh\necho \xff\n");
    }
    let metadata = json(&path, "ec2/latest/meta-data.json");
    assert_eq!(
        metadata["public-keys"]["0"]["openssh-key"],
        "ssh-ed25519 AAAA me@laptop"
    );
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 4 << 20);
}

#[test]
fn the_password_travels_as_a_hash_in_vendor_data_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = build(&drive(), dir.path());
    let vendor_data = json(&path, "openstack/latest/vendor_data.json");
    let text = vendor_data["cloud-init"].as_str().unwrap();
    let config: Value =
        serde_json::from_str(text.strip_prefix("#cloud-config\n").unwrap()).unwrap();
    assert_eq!(config["chpasswd"]["expire"], false);
    assert_eq!(config["chpasswd"]["users"][0]["name"], "root");
    assert_eq!(config["chpasswd"]["users"][0]["password"], HASH);
    assert_eq!(config["chpasswd"]["users"][0]["type"], "hash");
    assert_eq!(config["chpasswd"]["list"], format!("root:{HASH}\n"));
    let metadata = json(&path, "openstack/latest/meta_data.json");
    assert!(metadata.get("admin_pass").is_none());
    assert!(!format!("{:?}", drive()).contains("$6$"));

    let without = ConfigDriveSpec {
        password: None,
        ..drive()
    };
    let path = build(&without, dir.path());
    assert_eq!(
        json(&path, "openstack/latest/vendor_data.json"),
        serde_json::json!({})
    );
}

#[test]
fn the_same_spec_gives_the_same_bytes() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let [first, second] = [0, 1].map(|index| build(&drive(), dirs[index].path()));
    assert!(fs::read(&first).unwrap() == fs::read(&second).unwrap());
    let other = ConfigDriveSpec {
        instance_id: uuid::Uuid::nil(),
        ..drive()
    };
    build(&other, dirs[1].path());
    assert!(fs::read(&first).unwrap() != fs::read(&second).unwrap());
}

#[test]
fn the_drive_says_nothing_about_the_network() {
    let dir = tempfile::tempdir().unwrap();
    let path = build(&drive(), dir.path());
    let output = Command::new("mdir")
        .args(["-b", "-/", "-i"])
        .arg(&path)
        .arg("::openstack")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("::/openstack/latest/vendor_data2.json"),
        "{text}"
    );
    assert!(!text.contains("network"), "{text}");
}

#[test]
fn other_tools_read_the_drive() {
    let dir = tempfile::tempdir().unwrap();
    let path = build(&drive(), dir.path());
    let output = Command::new("blkid")
        .args(["-p", "-o", "export"])
        .arg(&path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for line in ["LABEL=config-2", "TYPE=vfat"] {
        assert!(text.lines().any(|found| found == line), "{text}");
    }
    let output = Command::new("mcopy")
        .arg("-i")
        .arg(&path)
        .args(["::openstack/latest/meta_data.json", "-"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        output.stdout,
        read(&path, "openstack/latest/meta_data.json")
    );
    let output = Command::new("fsck.fat")
        .args(["-n", "-v"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn what_does_not_fit_is_refused_and_the_old_drive_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = build(&drive(), dir.path());
    let before = fs::read(&path).unwrap();
    let refused = |drive: ConfigDriveSpec| {
        assert!(super::build(&path, &drive).is_err(), "{drive:?}");
        assert!(fs::read(&path).unwrap() == before);
    };
    refused(ConfigDriveSpec {
        user_data: Some(vec![b'A'; LONGEST_USER_DATA + 1]),
        ..drive()
    });
    let hashes = [
        "",
        "clear",
        "$6$salt$x\nevil:y",
        "$6$salt$x:y",
        "$6$x",
        "$6$a$b c",
    ];
    for hash in hashes {
        refused(ConfigDriveSpec {
            password: Some(CryptHash(hash.to_owned())),
            ..drive()
        });
    }
    for user in ["", "a b", "a\nb", "a:b", "-a", &"a".repeat(33)] {
        refused(ConfigDriveSpec {
            password_user: user.to_owned(),
            ..drive()
        });
    }
}

#[test]
fn the_largest_drive_that_the_api_allows_has_room() {
    let dir = tempfile::tempdir().unwrap();
    let metadata = (0..128)
        .map(|index| (format!("{index:0>255}"), "\u{1}".repeat(255)))
        .collect();
    let largest = ConfigDriveSpec {
        user_data: Some(vec![b'A'; LONGEST_USER_DATA]),
        metadata,
        ..drive()
    };
    let path = build(&largest, dir.path());
    assert_eq!(
        read(&path, "openstack/latest/user_data").len(),
        LONGEST_USER_DATA
    );
}
