// SPDX-License-Identifier: Apache-2.0
//! Images as messages.

use salvor_proto::v1;

use super::{states::Wire as _, time::timestamp};
use crate::core::image::ImageRecord;

/// An image on which `references` disks stand.
pub(in crate::api) fn image(record: &ImageRecord, references: u32) -> v1::Image {
    v1::Image {
        id: record.id.to_string(),
        name: record.name.clone(),
        format: record.format.wire(),
        size_bytes: record.size,
        virtual_size_bytes: record.virtual_size,
        sha256: record.sha256.clone(),
        properties: record
            .properties
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        create_time: Some(timestamp(record.created_at_ms)),
        references,
    }
}
