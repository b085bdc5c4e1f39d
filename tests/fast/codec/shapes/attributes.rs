//! Attributes of serde on structs and fields.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use chrono::{DateTime, Utc};
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::list::{List, Refused, Report, Same};

#[derive(Debug, Serialize, Deserialize)]
struct Unit;

#[derive(Debug, Serialize, Deserialize)]
struct Newtype(Vec<u8>);

#[derive(Debug, Serialize, Deserialize)]
struct Pair(u8, Option<String>);

#[derive(Debug, Serialize, Deserialize)]
struct NoFields {}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Renamed {
    first_name: String,
    #[serde(rename = "Last Name \"ü\"")]
    last: u8,
    #[serde(alias = "e_mail")]
    mail: u8,
    r#type: u8,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Defaults {
    a: u8,
    b: Option<u8>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    c: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
struct OptionLeftOut {
    #[serde(skip_serializing_if = "Option::is_none")]
    a: Option<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
struct LeftOut {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    a: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
#[allow(dead_code, reason = "only `Debug` reads the field that serde skips")]
struct NotWritten {
    #[serde(skip_serializing)]
    a: u8,
}

#[derive(Debug, Serialize, Deserialize)]
#[allow(dead_code, reason = "only `Debug` reads the field that serde skips")]
struct Skipped {
    a: u8,
    #[serde(skip)]
    b: u8,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct Transparent {
    a: Vec<u8>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
struct Converted(u8);

impl From<String> for Converted {
    fn from(text: String) -> Self {
        Self(u8::try_from(text.len()).unwrap_or(u8::MAX))
    }
}

impl From<Converted> for String {
    fn from(converted: Converted) -> Self {
        "x".repeat(converted.0.into())
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
struct Even(u8);

impl TryFrom<u8> for Even {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        if number.is_multiple_of(2) { Ok(Self(number)) } else { Err(format!("{number} is odd")) }
    }
}

impl From<Even> for u8 {
    fn from(even: Even) -> Self {
        even.0
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Timestamps {
    #[serde(with = "chrono::serde::ts_milliseconds")]
    millis: DateTime<Utc>,
    #[serde(with = "chrono::serde::ts_seconds_option")]
    seconds: Option<DateTime<Utc>>,
}

fn timestamps(nanos: i64) -> Vec<Timestamps> {
    vec![Timestamps {
        millis: DateTime::from_timestamp_nanos(nanos),
        seconds: DateTime::from_timestamp(3, 0),
    }]
}

#[derive(Debug, Serialize, Deserialize)]
struct OneWay {
    #[serde(serialize_with = "as_text")]
    a: u8,
}

fn as_text<S: Serializer>(number: &u8, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(number)
}

#[derive(Debug, Serialize, Deserialize)]
struct Failing {
    #[serde(serialize_with = "fail")]
    a: u8,
}

fn fail<S: Serializer>(_: &u8, _: S) -> Result<S::Ok, S::Error> {
    Err(serde::ser::Error::custom("it is secret"))
}

/// Serializes as the crate `serde_bytes` does.
#[derive(Debug)]
struct ByteString(Vec<u8>);

impl Serialize for ByteString {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for ByteString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;

        impl<'de> Visitor<'de> for Bytes {
            type Value = ByteString;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<ByteString, E> {
                Ok(ByteString(bytes.to_vec()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<ByteString, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = items.next_element()? {
                    bytes.push(byte);
                }
                Ok(ByteString(bytes))
            }
        }

        deserializer.deserialize_byte_buf(Bytes)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Flat<T> {
    id: u8,
    #[serde(flatten)]
    rest: T,
}

#[derive(Debug, Serialize, Deserialize)]
struct Inner<T> {
    inner: T,
}

#[derive(Debug, Serialize, Deserialize)]
enum Choice {
    One(u8),
    Other { text: String },
}

pub(super) fn add<R: Report>(list: &mut List<R>) {
    list.same("unit struct", || vec![Unit]);
    list.same("newtype struct", || vec![Newtype(vec![1])]);
    list.same("tuple struct", || vec![Pair(1, None), Pair(2, Some("a".into()))]);
    list.same("struct without fields", || vec![NoFields {}]);
    list.same("rename, rename_all, alias, deny_unknown_fields", || {
        vec![Renamed { first_name: "a".into(), last: 1, mail: 2, r#type: 3 }]
    });
    list.same("default, skip_serializing_if with default", || {
        vec![Defaults::default(), Defaults { a: 1, b: Some(2), c: vec![3] }]
    });
    list.same("skip_serializing_if on Option", || {
        vec![OptionLeftOut { a: None }, OptionLeftOut { a: Some(1) }]
    });
    list.same("skip_serializing_if without default, not skipped", || vec![LeftOut { a: vec![1] }]);
    list.refused("skip_serializing_if without default, skipped", || vec![LeftOut { a: vec![] }]);
    list.refused("skip_serializing without default", || vec![NotWritten { a: 1 }]);
    list.reads_as("skip", || vec![Skipped { a: 1, b: 2 }], || vec![Skipped { a: 1, b: 0 }]);
    list.same("transparent", || vec![Transparent { a: vec![1] }]);
    list.same("from, into", || vec![Converted(0), Converted(200)]);
    list.same("try_from, accepted", || vec![Even(2)]);
    list.refused("try_from, not accepted", || vec![Even(3)]);
    list.same("with", || timestamps(1_700_000_000_123_000_000));
    list.reads_as(
        "with, losing precision",
        || timestamps(1_700_000_000_123_456_789),
        || timestamps(1_700_000_000_123_000_000),
    );
    list.refused("serialize_with, not read that way", || vec![OneWay { a: 1 }]);
    list.refused("serialize_with, failing", || vec![Failing { a: 1 }]);
    list.same("byte string", || vec![ByteString(vec![]), ByteString(vec![0, 255])]);
    flatten(list);
}

fn flatten<R: Report>(list: &mut List<R>) {
    list.same("flatten, struct", || vec![Flat { id: 1, rest: Inner { inner: "a".to_owned() } }]);
    list.same("flatten twice", || {
        vec![Flat { id: 1, rest: Inner { inner: Flat { id: 2, rest: Inner { inner: 0.1_f32 } } } }]
    });
    list.same("flatten, Option", || {
        vec![Flat { id: 1, rest: None }, Flat { id: 1, rest: Some(Inner { inner: vec![Some(1_u8), None] }) }]
    });
    list.same("flatten, enum", || {
        vec![Flat { id: 1, rest: Choice::One(2) }, Flat { id: 1, rest: Choice::Other { text: "a".into() } }]
    });
    list.same("flatten, map", || vec![Flat { id: 1, rest: BTreeMap::from([("a".to_owned(), -1_i64)]) }]);
    // The keys of the map decide whether the value can be read.
    list.refused("flatten, map with a field's own name", || {
        vec![Flat { id: 1, rest: BTreeMap::from([("id".to_owned(), -1_i64)]) }]
    });
    list.refused("flatten, map with numbers as keys", || {
        vec![Flat { id: 1, rest: BTreeMap::from([(7_u64, 1_u8)]) }]
    });
    // The buffer of serde has no 128-bit numbers, not even small ones.
    list.refused("flatten, u128", || {
        [7, u128::MAX].map(|inner| Flat { id: 1, rest: Inner { inner } }).into()
    });
    list.refused("flatten, i128", || vec![Flat { id: 1, rest: Inner { inner: i128::MIN } }]);
    // Under flatten, serde reads CBOR as if it were text.
    let address = || vec![Flat { id: 1, rest: Inner { inner: IpAddr::V4(Ipv4Addr::LOCALHOST) } }];
    list.shape("flatten, IpAddr", address, Refused, Same);
    list.same("flatten, byte string", || vec![Flat { id: 1, rest: Inner { inner: ByteString(vec![1]) } }]);
}
