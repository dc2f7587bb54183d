// SPDX-License-Identifier: Apache-2.0
//! Messages of the API as proto3 JSON: field names as in the `.proto` files, every field present
//! that has no presence of its own, `Any` written out.

use prost::{Message, Name};
use prost_reflect::{
    DescriptorPool, DynamicMessage, ReflectMessage as _, SerializeOptions, Value,
    prost_types::FileDescriptorSet,
};

use super::text::is_harmful;

/// Why a message cannot be written as JSON. Each is a fault of this program.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JsonError {
    /// The built-in descriptors do not hold together.
    #[error("the built-in descriptors are unusable")]
    Descriptors(#[from] prost_reflect::DescriptorError),
    /// The built-in descriptors, or the message, cannot be decoded.
    #[error("a message cannot be decoded")]
    Decode(#[from] prost::DecodeError),
    /// A type has no descriptor.
    #[error("there is no descriptor of {0}")]
    NoDescriptor(String),
    /// A message cannot be serialised.
    #[error("a message cannot be written as JSON")]
    Serialize(#[from] serde_json::Error),
}

/// Writes messages as JSON.
#[derive(Debug)]
pub(crate) struct Json {
    pool: DescriptorPool,
}

impl Json {
    /// Reads the built-in descriptors.
    ///
    /// # Errors
    /// [`JsonError`], which means that the program was built wrongly.
    pub(crate) fn new() -> Result<Self, JsonError> {
        let mut pool = DescriptorPool::decode(salvor_proto::DESCRIPTORS)?;
        // What a google.rpc.Status carries as details. The set has files under other names than
        // ours, so what is there already is told by the messages.
        let mut details = FileDescriptorSet::decode(tonic_types::pb::FILE_DESCRIPTOR_SET)?;
        details.file.retain(|file| {
            !file.message_type.iter().any(|message| {
                let name = format!("{}.{}", file.package(), message.name());
                pool.get_message_by_name(&name).is_some()
            })
        });
        pool.add_file_descriptor_set(details)?;
        Ok(Self { pool })
    }

    /// `message` on several lines, or on one if `compact`.
    ///
    /// # Errors
    /// [`JsonError`].
    pub(crate) fn write<M: Message + Name>(
        &self,
        message: &M,
        compact: bool,
    ) -> Result<String, JsonError> {
        let name = M::full_name();
        let descriptor = self
            .pool
            .get_message_by_name(&name)
            .ok_or(JsonError::NoDescriptor(name))?;
        let mut dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())?;
        self.leave_out_unknown(&mut dynamic);
        let options = SerializeOptions::new()
            .skip_default_fields(false)
            .use_proto_field_name(true);
        let mut bytes = Vec::new();
        if compact {
            dynamic
                .serialize_with_options(&mut serde_json::Serializer::new(&mut bytes), &options)?;
        } else {
            dynamic.serialize_with_options(
                &mut serde_json::Serializer::pretty(&mut bytes),
                &options,
            )?;
        }
        Ok(escape(&String::from_utf8_lossy(&bytes)))
    }

    /// Removes every `Any` of a type that this version does not know, as a newer agent may send:
    /// JSON cannot show it, and the rest must not be lost for it.
    fn leave_out_unknown(&self, message: &mut DynamicMessage) {
        let mut gone = Vec::new();
        for (field, value) in message.fields_mut() {
            match value {
                Value::Message(inner) if self.is_unknown(inner) => gone.push(field),
                Value::Message(inner) => self.leave_out_unknown(inner),
                Value::List(items) => {
                    items.retain(
                        |item| !matches!(item, Value::Message(inner) if self.is_unknown(inner)),
                    );
                    for item in items {
                        if let Value::Message(inner) = item {
                            self.leave_out_unknown(inner);
                        }
                    }
                }
                _ => {}
            }
        }
        for field in gone {
            message.clear_field(&field);
        }
    }

    /// Is `message` an `Any` whose content cannot be shown?
    fn is_unknown(&self, message: &DynamicMessage) -> bool {
        if message.descriptor().full_name() != "google.protobuf.Any" {
            return false;
        }
        let Ok(any) = message.transcode_to::<prost_types::Any>() else {
            return true;
        };
        let name = any.type_url.rsplit('/').next().unwrap_or_default();
        match self.pool.get_message_by_name(name) {
            Some(descriptor) => DynamicMessage::decode(descriptor, any.value.as_slice()).is_err(),
            None => true,
        }
    }
}

/// Writes what could harm a terminal as `\u` escapes. JSON has such characters in strings only, where
/// the escape means the same.
fn escape(json: &str) -> String {
    if !json.contains(|c: char| c != '\n' && is_harmful(c)) {
        return json.to_owned();
    }
    let mut shown = String::with_capacity(json.len() + 32);
    for c in json.chars() {
        if c != '\n' && is_harmful(c) {
            let mut units = [0_u16; 2];
            for unit in c.encode_utf16(&mut units) {
                shown.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            shown.push(c);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use salvor_proto::{google, v1};
    use serde_json::Value as Parsed;

    use super::*;

    fn parsed<M: Message + Name>(message: &M) -> Parsed {
        serde_json::from_str(&Json::new().unwrap().write(message, false).unwrap()).unwrap()
    }

    #[test]
    fn fields_have_their_names_from_the_proto_and_defaults_are_there() {
        let json = parsed(&v1::Server {
            domain_name: "d".into(),
            revision: 7,
            ..Default::default()
        });
        assert_eq!(json["domain_name"], "d");
        assert_eq!(
            json["revision"], "7",
            "64-bit numbers are strings in proto3 JSON"
        );
        assert_eq!(json["vm_state"], "VM_STATE_UNSPECIFIED");
        assert_eq!(json["disks"], Parsed::Array(Vec::new()));
        assert!(json.get("rescue").is_none(), "an absent message is absent");
    }

    #[test]
    fn any_is_written_out_and_an_unknown_type_is_left_out() {
        let known = prost_types::Any::from_msg(&v1::OperationMetadata {
            action: "rescue".into(),
            ..Default::default()
        })
        .unwrap();
        let unknown = prost_types::Any {
            type_url: "type.googleapis.com/new.Thing".into(),
            value: vec![1],
        };
        let reason = prost_types::Any {
            type_url: "type.googleapis.com/google.rpc.ErrorInfo".into(),
            value: tonic_types::pb::ErrorInfo {
                reason: "WHY".into(),
                ..Default::default()
            }
            .encode_to_vec(),
        };
        let json = parsed(&google::longrunning::Operation {
            metadata: Some(known),
            result: Some(google::longrunning::operation::Result::Error(
                google::rpc::Status {
                    details: vec![unknown, reason],
                    ..Default::default()
                },
            )),
            ..Default::default()
        });
        assert_eq!(json["metadata"]["action"], "rescue");
        assert_eq!(json["error"]["details"].as_array().unwrap().len(), 1);
        assert_eq!(json["error"]["details"][0]["reason"], "WHY");
    }

    #[test]
    fn strings_keep_their_value_but_nothing_a_terminal_obeys() {
        let name = "a\u{9b}2J\u{202e}\u{7f}\x1b\u{e0041}東";
        let server = v1::Server {
            name: name.into(),
            ..Default::default()
        };
        let text = Json::new().unwrap().write(&server, true).unwrap();
        assert!(!text.contains(is_harmful), "{text}");
        assert_eq!(parsed(&server)["name"], name);
    }
}
