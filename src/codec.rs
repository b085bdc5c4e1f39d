//! Encoding of values: CBOR or JSON payloads, serde's variant names, upcasting of old payloads.
//!
//! Knows nothing of events and streams.

mod cbor;
#[cfg(test)]
mod cbor_equivalence_tests;
mod depth;
mod readable_value;
mod upcast;
mod variant;

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};

pub(crate) use self::cbor::SerializeError;
use self::cbor::serialize;
pub(crate) use self::cbor::{from_cbor, to_cbor};
use self::depth::Bounded;
pub(crate) use self::readable_value::{ReadableValue, Undecodable};
pub use self::upcast::Upcasters;
pub(crate) use self::variant::{decode_variant, encode_variant, failing_field, variants_of};

/// The encoding of the payloads in a store.
///
/// Chosen when the store is created, and recorded in it. Metadata is always CBOR. Serializes as its
/// [name](Self::name).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Codec {
    /// RFC 8949, the default: compact, and readable by tools that do not have the types.
    #[default]
    Cbor,
    /// RFC 8259, for stores whose payloads are queried with SQL.
    Json,
}

impl Codec {
    /// Returns the name that a store records.
    pub const fn name(self) -> &'static str {
        match self {
            Codec::Cbor => "cbor",
            Codec::Json => "json",
        }
    }

    /// Decodes a payload to a CBOR value, without the type of the event.
    ///
    /// # Errors
    /// If the bytes are malformed, nested too deeply, or more than one value. The text states the
    /// cause.
    pub fn decode_value(self, payload: &[u8]) -> Result<ciborium::Value, String> {
        decode_value(payload, self)
    }

    /// Returns the codec of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Codec::Cbor, Codec::Json].into_iter().find(|codec| codec.name() == name)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Codec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// Encodes a state that must be the same after it is decoded.
///
/// # Errors
/// If the state does not decode, or decodes to other content. A field that serde skips in both
/// directions goes unnoticed.
pub(crate) fn encode_snapshot<T: Serialize + DeserializeOwned>(state: &T) -> Result<Vec<u8>, String> {
    let bytes = to_cbor(state).map_err(|error| error.to_string())?;
    let read: T = from_cbor(&bytes)?;
    let of = |state: &T| fingerprint(state).map_err(|error| error.to_string());
    if of(state)? == of(&read)? {
        return Ok(bytes);
    }
    let state = std::any::type_name::<T>();
    Err(format!("a {state} has other content after decoding; let serde keep every field as it is"))
}

/// Decodes a payload of either codec to a CBOR value.
pub(crate) fn decode_value(payload: &[u8], codec: Codec) -> Result<ciborium::Value, String> {
    match codec {
        Codec::Cbor => from_cbor(payload),
        Codec::Json => serde_json::from_slice(payload).map_err(|error| error.to_string()),
    }
}

/// Encodes a CBOR value as payload.
///
/// Payloads of a JSON store stay JSON, because types may read the formats differently: a UUID is
/// text in JSON and bytes in CBOR.
pub(crate) fn encode_value(value: &ciborium::Value, codec: Codec) -> Result<Vec<u8>, String> {
    match codec {
        Codec::Cbor => to_cbor(value).map_err(|error| error.to_string()),
        Codec::Json => serde_json::to_vec(&Bounded::new(value)).map_err(|error| error.to_string()),
    }
}

/// Returns the fingerprint of a value, which is equal for equal content.
///
/// The order of the entries of a map or a set has no influence, because a new `HashMap` or
/// `HashSet` may iterate in another order. serde writes a set as a list, so lists in another order
/// have the same fingerprint. It detects mistakes, and is no protection against an attacker. Stores
/// keep fingerprints: the function must not change.
pub(crate) fn fingerprint<T: Serialize>(value: &T) -> Result<u128, SerializeError> {
    let value = serialize::<T, _, _>(
        || ciborium::Value::serialized(&Bounded::new(value)),
        |ciborium::value::Error::Custom(reason)| reason,
    )?;
    Ok(hash(&value))
}

/// FNV-1a, with the kind of each item before its content.
fn hash(value: &ciborium::Value) -> u128 {
    use ciborium::Value;

    const START: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let of = |kind: u8, bytes: &[u8]| {
        let kind = std::iter::once(&kind);
        kind.chain(bytes).fold(START, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME))
    };
    let then = |hash: u128, next: u128| (hash ^ next).wrapping_mul(PRIME);
    match value {
        Value::Integer(number) => of(1, &i128::from(*number).to_be_bytes()),
        Value::Bytes(bytes) => of(2, bytes),
        Value::Float(number) => of(3, &number.to_bits().to_be_bytes()),
        Value::Text(text) => of(4, text.as_bytes()),
        Value::Bool(truth) => of(5, &[u8::from(*truth)]),
        Value::Null => of(6, &[]),
        Value::Tag(tag, value) => then(of(7, &tag.to_be_bytes()), hash(value)),
        // A sum is independent of the order of the items.
        Value::Array(items) => {
            let length = of(8, &(items.len() as u64).to_be_bytes());
            then(length, items.iter().map(hash).fold(0, u128::wrapping_add))
        }
        Value::Map(entries) => {
            let entries = entries.iter().map(|(key, value)| then(hash(key), hash(value)));
            then(of(9, &[]), entries.fold(0, u128::wrapping_add))
        }
        _ => of(0, &[]),
    }
}

/// Encodes a `Vec<u8>` field as a CBOR byte string; serde alone writes an array of numbers.
pub(crate) mod byte_string {
    use std::fmt;

    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        deserializer.deserialize_byte_buf(Bytes)
    }

    struct Bytes;

    impl Visitor<'_> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a byte string")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }

        fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ciborium::Value;

    use super::*;

    #[test]
    fn a_fingerprint_depends_on_content_and_not_on_the_order_of_maps_and_sets() {
        let map = |entries: &[(&str, i32)]| {
            Value::Map(entries.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect())
        };
        let of = |value: &Value| fingerprint(value).unwrap();
        assert_eq!(of(&map(&[("a", 1), ("b", 2)])), of(&map(&[("b", 2), ("a", 1)])));
        let list = |items: &[i32]| Value::Array(items.iter().map(|item| (*item).into()).collect());
        assert_eq!(of(&list(&[1, 2, 3])), of(&list(&[3, 1, 2])));
        let others = [
            list(&[1, 1, 2]),
            list(&[1, 2, 2]),
            map(&[("a", 1), ("b", 2)]),
            map(&[("a", 2), ("b", 1)]),
            map(&[("a", 1)]),
            map(&[]),
            list(&[1, 2]),
            Value::Array(vec![Value::Array(vec![1.into()]), 2.into()]),
            Value::Array(vec![]),
            Value::Null,
            Value::Bool(false),
            0.into(),
            (-1).into(),
            0.5.into(),
            "".into(),
            "1".into(),
            Value::Bytes(vec![]),
            Value::Bytes(b"1".to_vec()),
        ];
        for (n, one) in others.iter().enumerate() {
            for (m, other) in others.iter().enumerate() {
                assert_eq!(of(one) == of(other), n == m, "{one:?} and {other:?}");
            }
        }
        // Stores keep fingerprints: this value must not change.
        let known = BTreeMap::from([("amount", 200_u64), ("to", 17)]);
        assert_eq!(fingerprint(&known).unwrap(), 5_334_932_053_074_692_741_925_981_755_865_334_704);
    }

    /// The node that sends a command and the node that receives it compute the same fingerprint.
    #[test]
    fn a_fingerprint_survives_the_wire() {
        #[derive(serde::Serialize)]
        enum All {
            Of {
                small: f32,
                exact: f64,
                less: i64,
                most: u64,
                id: uuid::Uuid,
                at: chrono::DateTime<chrono::Utc>,
            },
            And(Option<u8>, Option<u8>, Vec<u8>, (), char, String, BTreeMap<u64, bool>),
            Nothing,
        }
        let all = [
            All::Of {
                small: 0.1,
                exact: 0.1,
                less: i64::MIN,
                most: u64::MAX,
                id: uuid::Uuid::nil(),
                at: chrono::DateTime::UNIX_EPOCH,
            },
            All::And(None, Some(1), vec![1, 2], (), 'x', "y".into(), BTreeMap::from([(1, true)])),
            All::Nothing,
        ];
        for one in all {
            let sent: Value = from_cbor(&to_cbor(&one).unwrap()).unwrap();
            assert_eq!(fingerprint(&one).unwrap(), fingerprint(&sent).unwrap());
        }
    }
}
