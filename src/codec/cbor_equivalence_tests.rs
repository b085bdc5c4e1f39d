//! Equivalence of cbor4ii and ciborium: every value that cbor4ii reads, ciborium reads equally.
//!
//! Runs over many types, with bytes that ciborium wrote and random mutations of them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::Debug;

use chrono::{DateTime, Utc};
use ciborium::Value;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::byte_string;
use super::cbor::{quickly, to_cbor};
use crate::fuzz::fuzz;

/// The default enum form of serde, which events use.
#[derive(Debug, Serialize, Deserialize)]
enum External {
    Unit,
    Newtype(u8),
    Tuple(i16, String),
    Struct {
        number: u32,
        text: Option<String>,
        #[serde(default)]
        more: Vec<External>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type")]
enum Internal {
    Number { number: i64 },
    Float { float: f32, option: Option<u8> },
    Unit,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", content = "content")]
enum Adjacent {
    Newtype(u8),
    Struct { float: f64 },
    Unit,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged {
    Bool(bool),
    Number(i64),
    Float(f64),
    Text(String),
    List(Vec<Untagged>),
    Map(BTreeMap<String, Untagged>),
    Nothing(Option<u8>),
}

#[derive(Debug, Serialize, Deserialize)]
struct Flat {
    id: Uuid,
    at: DateTime<Utc>,
    letter: char,
    nothing: Option<()>,
    nested: Option<Option<u8>>,
    fixed: [u16; 3],
    #[serde(with = "byte_string")]
    bytes: Vec<u8>,
    #[serde(flatten)]
    rest: BTreeMap<String, Untagged>,
}

fn agree<T: Serialize + DeserializeOwned + Debug>(values: &[T]) {
    let name = std::any::type_name::<T>();
    let read = Cell::new(0);
    fuzz(name, values.iter().map(|value| to_cbor(value).unwrap()).collect(), |bytes| {
        let Some((quick, rest)) = quickly::<T>(bytes) else { return "left to ciborium".into() };
        read.set(read.get() + 1);
        let quick = format!("{quick:?}");
        let mut left = bytes;
        match ciborium::from_reader::<T, _>(&mut left) {
            Ok(value) => assert_eq!((&quick, rest), (&format!("{value:?}"), left)),
            // An error in a field that the type ignores.
            Err(error) => return error.to_string(),
        }
        quick
    });
    assert!(read.get() > values.len(), "{name}: {} values were read by cbor4ii", read.get());
}

#[test]
fn events() {
    let nested = External::Struct { number: 70_000, text: None, more: vec![External::Unit] };
    agree(&[
        External::Unit,
        External::Newtype(3),
        External::Tuple(-300, "two".into()),
        External::Struct { number: 1, text: Some("one".into()), more: vec![nested] },
    ]);
}

#[test]
fn enums_with_a_tag() {
    let float = Internal::Float { float: 0.1, option: Some(1) };
    agree(&[Internal::Number { number: i64::MIN }, float, Internal::Unit]);
    agree(&[Adjacent::Newtype(1), Adjacent::Struct { float: 0.1 }, Adjacent::Unit]);
}

#[test]
fn whatever_comes() {
    let list = vec![Untagged::Bool(true), Untagged::Number(-1), Untagged::Float(0.1), Untagged::Float(0.5)];
    let map = BTreeMap::from([("list".to_owned(), Untagged::List(list))]);
    agree(&[Untagged::Text("text".into()), Untagged::Nothing(None), Untagged::Map(map)]);
    agree(&[serde_json::json!({"a": [1, -2, 0.1, 0.5, null, true, "x"], "b": {"c": u64::MAX}})]);
    agree(&[
        Value::Map(vec![
            (1.into(), "one".into()),
            (Value::Null, vec![Value::Bool(true), Value::Bytes(vec![1])].into()),
        ]),
        Value::Tag(1, Box::new(0.into())),
        u64::MAX.into(),
        i128::from(i64::MIN).try_into().map(Value::Integer).unwrap(),
    ]);
}

#[test]
fn scalars() {
    agree(&[(0_u8, 1_u16, 2_u32, 3_u64, -1_i8, -2_i16, -3_i32, -4_i64)]);
    agree(&[(1_u128, -1_i128), (u128::MAX, i128::MIN)]);
    agree(&[(0.1_f32, 0.1_f64, f32::MAX, f64::MIN_POSITIVE)]);
    let flat = |nested, rest: &[(&str, f64)]| Flat {
        id: Uuid::from_u128(7),
        at: DateTime::UNIX_EPOCH,
        letter: 'ü',
        nothing: Some(()),
        nested,
        fixed: [1, 2, 300],
        bytes: vec![1; 30],
        rest: rest.iter().map(|(key, value)| ((*key).to_owned(), Untagged::Float(*value))).collect(),
    };
    agree(&[flat(None, &[]), flat(Some(Some(1)), &[("a", 0.1), ("b", 0.3)])]);
}
