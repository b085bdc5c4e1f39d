use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::EncodeError;

/// What travels with every event beside its payload.
///
/// The command that caused an event stands beside the metadata, as
/// [`RecordedEvent::command_id`](super::RecordedEvent::command_id). Stored as a CBOR map with the keys `correlation`,
/// `causation`, `traceparent`, `tracestate`, `user`, `reply` and `content`; absent values take no space, unknown keys are ignored.
/// Every event of a command carries it, so its size is limited: [`MAX_BYTES`](Self::MAX_BYTES).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// What ties together everything that one request from outside set off. Absent: the command's own id.
    #[serde(rename = "correlation", default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<Uuid>,
    /// The command or event that made somebody give the command that caused this event. Absent: it came from outside.
    #[serde(rename = "causation", default, skip_serializing_if = "Option::is_none")]
    pub causation_id: Option<Uuid>,
    /// W3C trace context: the `traceparent` header of the command's span; without one, as the caller gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// W3C trace context: the `tracestate` header, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
    /// The user's own entries: who asked, for which tenant, from where.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub user: BTreeMap<String, String>,
    /// The encoded reply of the command, on its last event: a repeated command is answered with it (I8). Empty: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "crate::codec::byte_string")]
    pub(crate) reply: Vec<u8>,
    /// A fingerprint of the command's content, on its last event: the same id with another content is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<u64>,
}

impl Metadata {
    /// Limit of the encoded size in bytes: 64 KiB. The reply of a command, which is stored beside it, does not count.
    pub const MAX_BYTES: usize = 64 * 1024;

    /// The bytes that a store keeps.
    ///
    /// # Errors
    /// When it is larger than [`MAX_BYTES`](Self::MAX_BYTES).
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

    /// Reads what [`encode`](Self::encode) wrote, or an older version of it.
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
