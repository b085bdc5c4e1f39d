//! How values become bytes and come back: CBOR (or JSON) payloads, the names that serde gives to variants, upcasting of old
//! shapes. Knows nothing of events and streams.

mod upcast;
mod variant;

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::upcast::Upcasters;
pub(crate) use self::variant::{decode_variant, encode_variant, variants_of};

/// How a store keeps payloads. Chosen when the store is created and remembered by it; metadata is always CBOR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Codec {
    /// RFC 8949, the default: compact, and readable by tools without the types.
    #[default]
    Cbor,
    /// RFC 8259, for stores whose payloads people want to query with SQL.
    Json,
}

impl Codec {
    /// The name that a store remembers.
    pub const fn name(self) -> &'static str {
        match self {
            Codec::Cbor => "cbor",
            Codec::Json => "json",
        }
    }

    /// The codec of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Codec::Cbor, Codec::Json].into_iter().find(|codec| codec.name() == name)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// serde refused to write a value.
#[derive(Debug, Clone, thiserror::Error)]
#[error("a value of type {type_name} does not serialize: {reason}")]
pub struct SerializeError {
    /// The Rust type.
    pub type_name: &'static str,
    /// What serde said.
    pub reason: String,
}

/// Any value as CBOR: snapshots, replies, metadata.
pub(crate) fn to_cbor<T: Serialize>(value: &T) -> Result<Vec<u8>, SerializeError> {
    // Most of what is written is between 60 and 250 bytes.
    let mut bytes = Vec::with_capacity(128);
    ciborium::into_writer(value, &mut bytes).map_err(|error| SerializeError {
        type_name: std::any::type_name::<T>(),
        reason: error.to_string(),
    })?;
    Ok(bytes)
}

/// Reads one CBOR value and insists that nothing follows it.
pub(crate) fn from_cbor<T: DeserializeOwned>(mut bytes: &[u8]) -> Result<T, String> {
    let value = ciborium::from_reader(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.is_empty() { Ok(value) } else { Err(format!("{} bytes too many", bytes.len())) }
}

/// A payload as CBOR value, whatever it is encoded in.
pub(crate) fn decode_value(payload: &[u8], codec: Codec) -> Result<ciborium::Value, String> {
    match codec {
        Codec::Cbor => from_cbor(payload),
        Codec::Json => serde_json::from_slice(payload).map_err(|error| error.to_string()),
    }
}

/// A CBOR value as payload. Payloads of a JSON store stay JSON: types may read both differently (a UUID is text in one, bytes
/// in the other).
pub(crate) fn encode_value(value: &ciborium::Value, codec: Codec) -> Result<Vec<u8>, String> {
    match codec {
        Codec::Cbor => to_cbor(value).map_err(|error| error.to_string()),
        Codec::Json => serde_json::to_vec(value).map_err(|error| error.to_string()),
    }
}

/// A `Vec<u8>` field as a CBOR byte string; serde alone would write an array of numbers.
pub(crate) mod byte_string {
    use ciborium::Value;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(D::Error::custom("expected a byte string")),
        }
    }
}
