//! The metadata of events.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::EncodeError;

/// The metadata of an event: correlation, causation, trace context and entries of the user.
///
/// The command that caused the event is beside the metadata, as
/// [`RecordedEvent::command_id`](super::RecordedEvent::command_id). Stored as a CBOR map with the
/// keys `correlation`, `causation`, `traceparent`, `tracestate`, `user`, `depth`, `reply` and
/// `content`.
/// Absent values take no space; unknown keys are ignored. Every event of a command carries the
/// metadata, so its size is limited: [`MAX_BYTES`](Self::MAX_BYTES).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Id shared by all effects of one external request. Default: the id of the command.
    #[serde(rename = "correlation", default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<Uuid>,
    /// Id of the command or event that led to the command of this event.
    ///
    /// Absent for external commands.
    #[serde(rename = "causation", default, skip_serializing_if = "Option::is_none")]
    pub causation_id: Option<Uuid>,
    /// W3C trace context: the `traceparent` header of the command span, else that of the caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// W3C trace context: the `tracestate` header, from the same source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
    /// Entries of the user: client, tenant, origin.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub user: BTreeMap<String, String>,
    /// Number of reactions of processes that led to the command, one after the other.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) depth: u16,
    /// I8: encoded reply of the command, on its last event.
    ///
    /// It answers a repeated command. Empty: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "crate::codec::byte_string")]
    pub(crate) reply: Vec<u8>,
    /// Fingerprint of the command, on its last event; rejects the same id with other content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<u64>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u16) -> bool {
    *number == 0
}

impl Metadata {
    /// Limit of the encoded size: 64 KiB. The stored reply of a command does not count.
    pub const MAX_BYTES: usize = 64 * 1024;

    /// Encodes the metadata as a store keeps it.
    ///
    /// # Errors
    /// If it is larger than [`MAX_BYTES`](Self::MAX_BYTES).
    pub fn encode(&self) -> Result<Bytes, EncodeError> {
        let bytes = crate::codec::to_cbor(self)?;
        if bytes.len() - self.reply.len() > Self::MAX_BYTES {
            return Err(self.too_large(bytes.len() - self.reply.len()));
        }
        Ok(bytes.into())
    }

    #[cold]
    fn too_large(&self, bytes: usize) -> EncodeError {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let user =
            self.user.iter().map(|(key, value)| (key.len() + value.len(), format!("entry {key:.40?}")));
        let largest = [
            (text(&self.traceparent), "traceparent".to_owned()),
            (text(&self.tracestate), "tracestate".to_owned()),
        ]
        .into_iter()
        .chain(user)
        .max_by_key(|(size, _)| *size)
        .map_or_else(String::new, |(_, name)| name);
        EncodeError::MetadataTooLarge { bytes, limit: Self::MAX_BYTES, largest }
    }

    /// Decodes the output of [`encode`](Self::encode), of this version or an older one.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        crate::codec::from_cbor(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_make_the_reader_panic() {
        let full = Metadata {
            correlation_id: Some(Uuid::now_v7()),
            causation_id: Some(Uuid::now_v7()),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
            tracestate: Some("vendor=1".into()),
            user: [("tenant".to_owned(), "é".to_owned())].into(),
            depth: 7,
            reply: vec![1, 2, 3],
            content: Some(u64::MAX),
        };
        let seeds = [full, Metadata::default()].map(|metadata| metadata.encode().unwrap().to_vec());
        crate::fuzz::fuzz("metadata", seeds.into(), |bytes| match Metadata::decode(bytes) {
            Ok(metadata) => {
                assert_eq!(Metadata::decode(&metadata.encode().unwrap()), Ok(metadata));
                "some".into()
            }
            Err(error) => error,
        });
    }
}
