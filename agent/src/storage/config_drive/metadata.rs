// SPDX-License-Identifier: Apache-2.0
//! What stands in the files of a config drive.

use serde_json::{Value, json};
use uuid::Uuid;

use super::ConfigDrive;

/// The metadata versions of OpenStack; each has its folder, `latest` is what most readers open.
const VERSIONS: [&str; 10] = [
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
    "2020-10-14",
    "latest",
];
/// The versions from which on there is vendor data, of the static and of the dynamic kind. They are
/// dates, so that they compare as text; `latest` comes after all.
const VENDOR_DATA: &str = "2013-10-17";
const VENDOR_DATA2: &str = "2016-10-06";
const EC2_VERSIONS: [&str; 2] = ["2009-04-04", "latest"];

/// The longest label of a host name (RFC 1123).
const LONGEST_LABEL: usize = 63;

/// The files of a drive, in the order in which they are written.
pub(super) fn files(drive: &ConfigDrive, user_data: Option<&[u8]>) -> Vec<(String, Vec<u8>)> {
    let metadata = text(&openstack(drive));
    let vendor_data = text(&vendor_data(drive));
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

fn openstack(drive: &ConfigDrive) -> Value {
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

fn ec2(drive: &ConfigDrive) -> Value {
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
fn vendor_data(drive: &ConfigDrive) -> Value {
    let Some(hash) = &drive.admin_pass_hash else {
        return json!({});
    };
    let config = json!({
        "chpasswd": {
            "expire": false,
            "users": [{"name": "root", "password": hash.0, "type": "hash"}],
            "list": format!("root:{}\n", hash.0),
        },
        "ssh_pwauth": true,
    });
    // JSON is YAML, and written by a serialiser: nothing in it can break out of its place.
    json!({"cloud-init": format!("#cloud-config\n{config}\n")})
}

/// A host name made of a server's name: Nova's rules, narrowed to what RFC 1123 takes. Blanks,
/// underscores and dots become hyphens, everything else that is no ASCII letter or digit is left
/// out; at most 63 characters, lower case, no hyphen at either end. If nothing is left, the id
/// makes the name.
#[must_use]
pub fn host_name(name: &str, id: Uuid) -> String {
    let cleaned: String = name
        .chars()
        .map(|letter| match letter {
            ' ' | '_' | '.' => '-',
            other => other,
        })
        .filter(|letter| letter.is_ascii_alphanumeric() || *letter == '-')
        .map(|letter| letter.to_ascii_lowercase())
        .collect();
    let label: String = cleaned
        .trim_start_matches('-')
        .chars()
        .take(LONGEST_LABEL)
        .collect();
    match label.trim_end_matches('-') {
        "" => format!("server-{id}"),
        label => label.to_owned(),
    }
}
