// SPDX-License-Identifier: Apache-2.0
//! What stands in the files of a config drive.

use serde_json::{Value, json};

use crate::core::plan::ConfigDriveSpec;

/// The metadata versions of OpenStack; each has its folder, `latest` is what most readers open.
const VERSIONS: [&str; 11] = [
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
    "2020-10-14",
    "2025-04-04",
    "latest",
];
/// The versions from which on there is vendor data, of the static and of the dynamic kind. They are
/// dates, so that they compare as text; `latest` comes after all.
const VENDOR_DATA: &str = "2013-10-17";
const VENDOR_DATA2: &str = "2016-10-06";
const EC2_VERSIONS: [&str; 2] = ["2009-04-04", "latest"];

/// The files of a drive, in the order in which they are written.
pub(super) fn files(drive: &ConfigDriveSpec) -> Vec<(String, Vec<u8>)> {
    let metadata = text(&openstack(drive));
    let vendor_data = text(&vendor_data(drive));
    let user_data = drive.user_data.as_deref();
    let mut files = Vec::new();
    for version in VERSIONS {
        let folder = format!("openstack/{version}");
        files.push((format!("{folder}/meta_data.json"), metadata.clone()));
        if let Some(user_data) = user_data {
            files.push((format!("{folder}/user_data"), user_data.to_owned()));
        }
        if version >= VENDOR_DATA {
            files.push((format!("{folder}/vendor_data.json"), vendor_data.clone()));
        }
        if version >= VENDOR_DATA2 {
            files.push((format!("{folder}/vendor_data2.json"), b"{}\n".to_vec()));
        }
    }
    let metadata = text(&ec2(drive));
    for version in EC2_VERSIONS {
        let folder = format!("ec2/{version}");
        files.push((format!("{folder}/meta-data.json"), metadata.clone()));
        if let Some(user_data) = user_data {
            files.push((format!("{folder}/user-data"), user_data.to_owned()));
        }
    }
    files
}

fn text(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn openstack(drive: &ConfigDriveSpec) -> Value {
    let keys: Vec<Value> = drive
        .public_keys
        .iter()
        .map(|(name, key)| json!({"name": name, "type": "ssh", "data": key}))
        .collect();
    json!({
        "uuid": drive.instance_id,
        "name": drive.name,
        "hostname": drive.hostname,
        "launch_index": 0,
        "availability_zone": "nova",
        "meta": drive.metadata,
        "public_keys": drive.public_keys,
        "keys": keys,
        "files": [],
        "devices": [],
    })
}

fn ec2(drive: &ConfigDriveSpec) -> Value {
    let keys: serde_json::Map<String, Value> = drive
        .public_keys
        .values()
        .enumerate()
        .map(|(index, key)| (index.to_string(), json!({"openssh-key": key})))
        .collect();
    json!({
        "instance-id": drive.instance_id,
        "hostname": drive.hostname,
        "local-hostname": drive.hostname,
        "ami-launch-index": 0,
        "public-keys": keys,
    })
}

/// The password, as a cloud-config that cloud-init merges under the user's own.
///
/// It is said twice: `users` is what cloud-init reads from 22.2 on, `list` is what older ones know
/// (they tell a hash from a password by its beginning). The two are merged key by key, so a user's
/// cloud-config that brings one of them leaves the other. `expire` is off: a forced change at the
/// first login would make the password that was returned useless over SSH and on a serial console.
fn vendor_data(drive: &ConfigDriveSpec) -> Value {
    let Some(hash) = &drive.password else {
        return json!({});
    };
    let user = &drive.password_user;
    let config = json!({
        "chpasswd": {
            "expire": false,
            "users": [{"name": user, "password": hash.0, "type": "hash"}],
            "list": format!("{user}:{}\n", hash.0),
        },
        "ssh_pwauth": true,
    });
    // JSON is YAML, and written by a serialiser: nothing in it can break out of its place.
    json!({"cloud-init": format!("#cloud-config\n{config}\n")})
}
