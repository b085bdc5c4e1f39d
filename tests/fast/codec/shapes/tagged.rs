//! Enums within events, in each representation of serde.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::list::{List, Refused, Report, Same};

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum External {
    UnitLike,
    #[serde(rename = "new type", alias = "n")]
    Newtype(Box<Option<External>>),
    Tuple(i16, String),
    Struct {
        a_field: u8,
    },
    Empty {},
    #[serde(skip_serializing)]
    NotWritten,
    #[serde(other)]
    Other,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type")]
enum Internal<T> {
    Unit,
    Newtype(Inner<T>),
    Struct { value: T },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", content = "content")]
enum Adjacent<T> {
    Unit,
    Newtype(T),
    Tuple(u8, T),
    Struct { value: T },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged<T> {
    Struct { value: T },
    Tuple(u8, T),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Plain {
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    List(Vec<Plain>),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Ambiguous {
    Small(u8),
    Large(u64),
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Key {
    One,
}

#[derive(Debug, Serialize, Deserialize)]
struct Inner<T> {
    value: T,
}

fn internal<T>(make: fn() -> T) -> Vec<Internal<T>> {
    vec![Internal::Unit, Internal::Newtype(Inner { value: make() }), Internal::Struct { value: make() }]
}

/// Returns the values without the variant that every codec stores.
fn internal_only<T>(make: fn() -> T) -> Vec<Internal<T>> {
    internal(make).into_iter().skip(1).collect()
}

fn adjacent<T>(make: fn() -> T) -> Vec<Adjacent<T>> {
    vec![
        Adjacent::Unit,
        Adjacent::Newtype(make()),
        Adjacent::Tuple(1, make()),
        Adjacent::Struct { value: make() },
    ]
}

fn untagged<T>(make: fn() -> T) -> Vec<Untagged<T>> {
    vec![Untagged::Struct { value: make() }, Untagged::Tuple(1, make())]
}

fn address() -> IpAddr {
    IpAddr::V6(Ipv6Addr::LOCALHOST)
}

fn ids() -> (Uuid, DateTime<Utc>, char, Option<u8>) {
    (Uuid::from_u128(7), DateTime::UNIX_EPOCH, 'ü', None)
}

pub(super) fn add<R: Report>(list: &mut List<R>) {
    list.same("externally tagged", || {
        vec![
            External::UnitLike,
            External::Newtype(Box::new(None)),
            External::Newtype(Box::new(Some(External::Tuple(-300, "a".into())))),
            External::Tuple(1, String::new()),
            External::Struct { a_field: 1 },
            External::Empty {},
            External::Other,
        ]
    });
    list.refused("variant with skip_serializing", || vec![External::NotWritten]);

    list.same("internally tagged", || internal(|| "a".to_owned()));
    list.same("internally tagged, Uuid, DateTime, char, Option", || internal(ids));
    list.same("internally tagged, nested", || internal(|| adjacent(|| 0.1_f64)));
    list.same("internally tagged, enum as key", || internal(|| BTreeMap::from([(Key::One, 1_u8)])));
    // serde buffers the content. The buffer has no 128-bit numbers, and no null but None.
    list.refused("internally tagged, u128", || internal_only(|| u128::MAX));
    list.shape("internally tagged, ()", || internal_only(|| ()), Refused, Same);
    list.shape("internally tagged, IpAddr", || internal_only(address), Refused, Same);
    list.shape(
        "internally tagged, number as key",
        || internal_only(|| BTreeMap::from([(7_u64, 1_u8)])),
        Same,
        Refused,
    );

    list.same("adjacently tagged", || adjacent(|| "a".to_owned()));
    list.same("adjacently tagged, u128, IpAddr", || adjacent(|| (u128::MAX, address())));
    list.same("adjacently tagged, ids", || adjacent(ids));

    list.same("untagged", || untagged(|| vec![Some("a".to_owned()), None]));
    list.same("untagged, any value", || {
        let list = Plain::List(vec![Plain::Bool(true), Plain::Integer(-1), Plain::Float(1.0)]);
        vec![list, Plain::Text("a".into()), Plain::Float(0.1), Plain::Integer(i64::MAX)]
    });
    list.refused("untagged, u128", || untagged(|| u128::MAX));
    list.shape("untagged, IpAddr", || untagged(address), Refused, Same);
    // The first variant that can hold the value wins.
    list.reads_as(
        "untagged, ambiguous",
        || vec![Ambiguous::Large(7), Ambiguous::Large(300)],
        || vec![Ambiguous::Small(7), Ambiguous::Large(300)],
    );
}
