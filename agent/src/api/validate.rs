// SPDX-License-Identifier: Apache-2.0
//! The rules for every field of a request. Each is checked here, before anything else sees it; a
//! refusal names the field and the rule, and repeats no more of the value than is safe.
//!
//! The limits are Nova's where it has them (`nova/api/openstack/compute/schemas/servers.py`,
//! `nova/api/validation/parameter_types.py`).

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use uuid::Uuid;

use crate::core::{
    action::{NicArgs, NicConnection},
    reason::Refusal,
    record::Flavor,
    text::{echo, is_printable},
};

/// What a check finds.
pub(super) type Checked<T> = Result<T, Refusal>;

/// The longest name, in characters.
const NAME: usize = 255;
/// Entries of metadata, properties or keys (Nova's quota `metadata_items`).
const ENTRIES: usize = 128;
/// The longest SSH public key in bytes; one of 16,384 bits has 2,800.
const PUBLIC_KEY: usize = 16_384;
/// 65,535 characters of base64, which is Nova's limit.
const USER_DATA: usize = 49_149;
/// The longest time a guest may be given to shut down.
pub(super) const SHUTDOWN: Duration = Duration::from_secs(3_600);
/// The longest time after which a rescue ends by itself.
pub(super) const RESCUE: Duration = Duration::from_secs(30 * 86_400);
/// The longest time after which a lock ends by itself.
pub(super) const LOCK: Duration = Duration::from_secs(365 * 86_400);
/// The longest time for which an operation that is to be abandoned is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);
/// Tags of a server, and the longest one in characters (Nova: `nova/objects/tag.py`, `MAX_TAG_COUNT` of
/// `nova/objects/instance.py`).
const TAGS: (usize, usize) = (50, 60);
/// Interfaces of a new server: as many as PCI Express root ports that fit beside the other devices.
const INTERFACES: usize = 24;
/// vCPUs: what a q35 machine takes at most with older QEMUs is 288; libvirt refuses what this host's
/// QEMU cannot.
const VCPUS: u32 = 512;
/// The least and the most memory in MiB: the smallest kernel boots with 16 MiB; 16 TiB is more than
/// hosts have.
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 16..=16 << 20;
/// The largest root disk in GiB (64 TiB).
const DISK_GIB: u64 = 64 << 10;
/// Page size if none is given, and the largest.
const PAGE: (u32, u32) = (100, 1_000);

/// 1 to 255 printable characters without space at either end.
pub(super) fn name(field: &str, value: &str) -> Checked<()> {
    let fits = (1..=NAME).contains(&value.chars().take(NAME + 1).count());
    if fits && value.chars().all(is_printable) && value.trim() == value {
        return Ok(());
    }
    Err(Refusal::field(
        field,
        format!(
            "must be 1 to {NAME} printable characters without space at either end, and is {:?}",
            echo(value)
        ),
    ))
}

/// What refers to something by id, beginning of an id or name: what can be none of these is refused
/// before it is looked for.
pub(super) fn reference(field: &str, value: &str) -> Checked<()> {
    name(field, value).map_err(|_| {
        Refusal::field(
            field,
            format!(
                "must be an id, the unique beginning of one or a unique name, and is {:?}",
                echo(value)
            ),
        )
    })
}

/// A uuid in its usual form.
pub(super) fn uuid(field: &str, value: &str) -> Checked<Uuid> {
    let parsed = (value.len() == 36)
        .then(|| Uuid::try_parse(value).ok())
        .flatten();
    match parsed {
        Some(id) if !id.is_nil() => Ok(id),
        _ => Err(Refusal::field(
            field,
            format!(
                "must be a uuid such as 7f0c1a52-3d9e-4b6f-8a21-5c0e9d7b4f13, and is {:?}",
                echo(value)
            ),
        )),
    }
}

/// A uuid, or nothing.
pub(super) fn optional_uuid(field: &str, value: &str) -> Checked<Option<Uuid>> {
    if value.is_empty() {
        Ok(None)
    } else {
        uuid(field, value).map(Some)
    }
}

/// The client's id of a call, in lower case, or nothing.
pub(super) fn request_id(value: &str) -> Checked<Option<String>> {
    Ok(optional_uuid("request_id", value)?.map(|id| id.to_string()))
}

fn entries<V>(field: &str, map: &HashMap<String, V>) -> Checked<()> {
    if map.len() <= ENTRIES {
        return Ok(());
    }
    Err(Refusal::field(
        field,
        format!("must have at most {ENTRIES} entries, and has {}", map.len()),
    ))
}

/// At most 255 printable characters.
pub(super) fn text(field: &str, value: &str) -> Checked<()> {
    if value.chars().take(NAME + 1).count() <= NAME && value.chars().all(is_printable) {
        return Ok(());
    }
    Err(Refusal::field(
        field,
        format!(
            "must be at most {NAME} printable characters, and is {:?}",
            echo(value)
        ),
    ))
}

/// Nova's metadata: at most 128 entries, keys of letters, digits and `-_:. `.
pub(super) fn metadata(
    field: &str,
    map: HashMap<String, String>,
) -> Checked<BTreeMap<String, String>> {
    entries(field, &map)?;
    for (key, value) in &map {
        let allowed =
            |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | ':' | '.' | ' ');
        if !(1..=NAME).contains(&key.len()) || !key.chars().all(allowed) {
            return Err(Refusal::field(
                field,
                format!(
                    "keys must be 1 to {NAME} letters, digits or \"-_:. \", and one is {:?}",
                    echo(key)
                ),
            ));
        }
        text(&format!("{field}[{}]", echo(key)), value)?;
    }
    Ok(map.into_iter().collect())
}

/// Nova's tags: at most 50 of 1 to 60 printable characters, without comma and slash. Each counts once.
pub(super) fn tags(field: &str, tags: &[String]) -> Checked<Vec<String>> {
    let (most, longest) = TAGS;
    if tags.len() > most {
        return Err(Refusal::field(
            field,
            format!("must be at most {most}, and are {}", tags.len()),
        ));
    }
    let mut checked: Vec<String> = Vec::new();
    for tag in tags {
        let fits = (1..=longest).contains(&tag.chars().take(longest + 1).count());
        if !fits || !tag.chars().all(is_printable) || tag.contains([',', '/']) {
            return Err(Refusal::field(
                field,
                format!(
                    "must each be 1 to {longest} printable characters without comma and slash, and one is {:?}",
                    echo(tag)
                ),
            ));
        }
        if !checked.contains(tag) {
            checked.push(tag.clone());
        }
    }
    Ok(checked)
}

/// Why something is done: 1 to 255 printable characters.
pub(super) fn reason(field: &str, value: &str) -> Checked<()> {
    if value.is_empty() {
        return Err(Refusal::field(field, "must not be empty; leave it out"));
    }
    text(field, value)
}

/// Properties of an image: at most 128, keys and values of at most 255 printable characters.
pub(super) fn properties(
    field: &str,
    map: HashMap<String, String>,
) -> Checked<BTreeMap<String, String>> {
    entries(field, &map)?;
    for (key, value) in &map {
        name(field, key)?;
        text(&format!("{field}[{}]", echo(key)), value)?;
    }
    Ok(map.into_iter().collect())
}

/// SSH public keys by name: at most 128, each one printable line.
pub(super) fn public_keys(
    field: &str,
    map: HashMap<String, String>,
) -> Checked<BTreeMap<String, String>> {
    entries(field, &map)?;
    for (key, value) in &map {
        name(field, key)?;
        if value.is_empty() || value.len() > PUBLIC_KEY || !value.chars().all(is_printable) {
            return Err(Refusal::field(
                format!("{field}[{}]", echo(key)),
                format!("must be one printable line of at most {PUBLIC_KEY} bytes"),
            ));
        }
    }
    Ok(map.into_iter().collect())
}

/// User data: any bytes, or nothing.
pub(super) fn user_data(field: &str, value: Vec<u8>) -> Checked<Option<Vec<u8>>> {
    if value.len() > USER_DATA {
        return Err(Refusal::field(
            field,
            format!(
                "must be at most {USER_DATA} bytes (65,535 characters of base64), and is {}",
                value.len()
            ),
        ));
    }
    Ok((!value.is_empty()).then_some(value))
}

/// Host name: 1 to 63 letters, digits and hyphens, none at either end (RFC 1123).
pub(super) fn hostname(field: &str, value: &str) -> Checked<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if (1..=63).contains(&value.len())
        && value.chars().all(allowed)
        && !value.starts_with('-')
        && !value.ends_with('-')
    {
        return Ok(());
    }
    Err(Refusal::field(
        field,
        format!(
            "must be 1 to 63 letters, digits and hyphens, no hyphen at either end, and is {:?}",
            echo(value)
        ),
    ))
}

/// The host name that follows from a server's name (Nova: `sanitize_hostname`): what is no letter,
/// digit or separator goes, separators become hyphens, upper case becomes lower.
pub(super) fn hostname_from(name: &str, server: Uuid) -> String {
    let kept: String = name
        .chars()
        .filter_map(|c| match c {
            ' ' | '_' | '.' | '-' => Some('-'),
            c if c.is_ascii_alphanumeric() => Some(c.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    let start = kept.trim_start_matches('-');
    // Only ASCII is left, so bytes are characters.
    let hostname = start.get(..63).unwrap_or(start).trim_end_matches('-');
    if hostname.is_empty() {
        format!("server-{server}")
    } else {
        hostname.to_owned()
    }
}

/// The word for a bridge, network, machine type or device model: it goes into XML and to QEMU.
pub(super) fn word(field: &str, value: &str) -> Checked<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if (1..=64).contains(&value.len())
        && value.chars().all(allowed)
        && !value.starts_with(['-', '.'])
    {
        return Ok(());
    }
    Err(Refusal::field(
        field,
        format!(
            "must be 1 to 64 letters, digits or \"_.-\", beginning with none of \".-\", and is {:?}",
            echo(value)
        ),
    ))
}

/// A unicast MAC address, in lower case.
pub(super) fn mac(field: &str, value: &str) -> Checked<String> {
    let octets: Vec<&str> = value.split(':').take(7).collect();
    let hex = |octet: &&str| octet.len() == 2 && octet.bytes().all(|byte| byte.is_ascii_hexdigit());
    let first = octets
        .first()
        .and_then(|octet| u8::from_str_radix(octet, 16).ok());
    let unicast = first.is_some_and(|first| first & 1 == 0);
    if octets.len() == 6
        && octets.iter().all(hex)
        && unicast
        && value.chars().any(|c| !matches!(c, '0' | ':'))
    {
        return Ok(value.to_ascii_lowercase());
    }
    Err(Refusal::field(
        field,
        format!(
            "must be a unicast MAC address such as 52:54:00:12:34:56, and is {:?}",
            echo(value)
        ),
    ))
}

/// The interfaces of a new server.
pub(super) fn interfaces(
    field: &str,
    specs: Vec<salvor_proto::v1::NetworkInterfaceSpec>,
) -> Checked<Vec<NicArgs>> {
    use salvor_proto::v1::network_interface_spec::Connection;
    if specs.len() > INTERFACES {
        return Err(Refusal::field(
            field,
            format!("must be at most {INTERFACES}, and are {}", specs.len()),
        ));
    }
    let check = |(index, spec): (usize, salvor_proto::v1::NetworkInterfaceSpec)| {
        let connection = match spec.connection {
            Some(Connection::Bridge(bridge)) => {
                word(&format!("{field}[{index}].bridge"), &bridge)?;
                NicConnection::Bridge(bridge)
            }
            Some(Connection::Network(network)) => {
                word(&format!("{field}[{index}].network"), &network)?;
                NicConnection::Network(network)
            }
            Some(Connection::User(true)) => NicConnection::User,
            Some(Connection::User(false)) | None => {
                return Err(Refusal::field(
                    format!("{field}[{index}]"),
                    "must name a bridge, a network or user",
                ));
            }
        };
        let mac = match spec.mac.as_str() {
            "" => None,
            given => Some(mac(&format!("{field}[{index}].mac"), given)?),
        };
        let model = match spec.model.as_str() {
            "" => "virtio".to_owned(),
            given => {
                word(&format!("{field}[{index}].model"), given)?;
                spec.model
            }
        };
        Ok(NicArgs {
            connection,
            mac,
            model,
        })
    };
    specs.into_iter().enumerate().map(check).collect()
}

/// The size of a new server.
pub(super) fn flavor(field: &str, value: Option<salvor_proto::v1::Flavor>) -> Checked<Flavor> {
    let Some(flavor) = value else {
        return Err(Refusal::field(field, "must be given"));
    };
    let refuse = |part: &str, rule: String| Err(Refusal::field(format!("{field}.{part}"), rule));
    if !(1..=VCPUS).contains(&flavor.vcpus) {
        return refuse(
            "vcpus",
            format!("must be 1 to {VCPUS}, and is {}", flavor.vcpus),
        );
    }
    if !MEMORY_MIB.contains(&flavor.memory_mib) {
        let (least, most) = (MEMORY_MIB.start(), MEMORY_MIB.end());
        return refuse(
            "memory_mib",
            format!("must be {least} to {most}, and is {}", flavor.memory_mib),
        );
    }
    if flavor.disk_gib > DISK_GIB {
        return refuse(
            "disk_gib",
            format!("must be 0 to {DISK_GIB}, and is {}", flavor.disk_gib),
        );
    }
    Ok(Flavor {
        vcpus: flavor.vcpus,
        memory_mib: flavor.memory_mib,
        disk_gib: flavor.disk_gib,
    })
}

/// A duration from 0 to `most`.
pub(super) fn duration(
    field: &str,
    value: Option<prost_types::Duration>,
    most: Duration,
) -> Checked<Option<Duration>> {
    let Some(given) = value else { return Ok(None) };
    let parsed = match (u64::try_from(given.seconds), u32::try_from(given.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Some(Duration::new(seconds, nanos)),
        _ => None,
    };
    match parsed {
        Some(duration) if duration <= most => Ok(Some(duration)),
        _ => Err(Refusal::field(
            field,
            format!(
                "must be 0 s to {} s, and is {} s and {} ns",
                most.as_secs(),
                given.seconds,
                given.nanos
            ),
        )),
    }
}

/// The size of a page: 0 means 100, and more than 1,000 means 1,000.
pub(super) fn page_size(value: i32) -> Checked<usize> {
    let (usual, most) = PAGE;
    let size = match u32::try_from(value) {
        Ok(0) => usual,
        Ok(size) => size.min(most),
        Err(_) => {
            return Err(Refusal::field(
                "page_size",
                format!("must not be negative, and is {value}"),
            ));
        }
    };
    Ok(usize::try_from(size).unwrap_or(usize::MAX))
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
