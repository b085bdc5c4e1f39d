//! Types of the standard library and of crates that events often hold.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroI64, NonZeroU8, Wrapping};
use std::ops::{Bound, Range};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::list::{As, List, Refused, Report, Same};

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Color {
    Red,
    DarkGreen,
}

#[derive(Debug, Serialize, Deserialize)]
struct Node {
    next: Option<Box<Node>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Layer(Option<Box<Layer>>);

fn nodes(depth: usize) -> Vec<Node> {
    vec![(1..depth).fold(Node { next: None }, |next, _| Node { next: Some(Box::new(next)) })]
}

fn layers(depth: usize) -> Vec<Layer> {
    vec![(1..depth).fold(Layer(None), |layer, _| Layer(Some(Box::new(layer))))]
}

fn json(depth: usize) -> Vec<serde_json::Value> {
    let array = (0..depth).fold(serde_json::Value::Null, |value, _| serde_json::Value::Array(vec![value]));
    let object = (0..depth).fold(serde_json::Value::Null, |value, _| serde_json::json!({ "a": value }));
    vec![array, object]
}

pub(super) fn add<R: Report>(list: &mut List<R>) {
    numbers(list);
    containers(list);
    keys(list);
    crates(list);
    nesting(list);
}

fn numbers<R: Report>(list: &mut List<R>) {
    list.same("bool", || vec![true, false]);
    list.same("i8", || vec![i8::MIN, -1, 0, i8::MAX]);
    list.same("i16", || vec![i16::MIN, -1, 0, i16::MAX]);
    list.same("i32", || vec![i32::MIN, -1, 0, i32::MAX]);
    list.same("i64", || vec![i64::MIN, -1, 0, i64::MAX]);
    list.same("i128", || vec![i128::MIN, i128::from(i64::MIN) - 1, -1, 0, i128::MAX]);
    list.same("u8", || vec![0, 23, 24, u8::MAX]);
    list.same("u16", || vec![0, 255, 256, u16::MAX]);
    list.same("u32", || vec![0, 65_536, u32::MAX]);
    list.same("u64", || vec![0, 1 << 53, (1 << 53) + 1, u64::MAX]);
    list.same("u128", || vec![0, u128::from(u64::MAX), u128::from(u64::MAX) + 1, u128::MAX]);
    list.same("usize, isize", || vec![(usize::MIN, isize::MIN), (usize::MAX, isize::MAX)]);
    list.same("f32", || vec![0.0, -0.0, 0.1, 0.5, f32::MIN_POSITIVE, f32::MIN, f32::MAX]);
    list.same("f64", || vec![0.0, -0.0, 0.1, 0.5, 1e300, f64::MIN_POSITIVE, f64::MIN, f64::MAX]);
    list.shape("f32, not finite", || vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY], Same, Refused);
    list.shape("f64, not finite", || vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY], Same, Refused);
    // JSON writes NaN as null.
    list.shape("Option<f64>, NaN", || vec![Some(f64::NAN)], Same, As(|| vec![None]));
    list.same("NonZero", || vec![(NonZeroU8::MIN, NonZeroI64::MIN), (NonZeroU8::MAX, NonZeroI64::MAX)]);
    list.same("Wrapping", || vec![Wrapping(u8::MAX)]);
    list.same("char", || vec!['a', '\0', '"', 'ü', '🦀']);
    list.same("String", || vec![String::new(), "a\0\"\\\u{2028}🦀".into(), "x".repeat(300)]);
}

fn containers<R: Report>(list: &mut List<R>) {
    list.same("()", || vec![()]);
    list.same("Option<u8>", || vec![None, Some(1)]);
    list.same("Option<Vec<u8>>", || vec![None, Some(vec![]), Some(vec![1])]);
    // serde writes null for each None, at any depth.
    list.reads_as(
        "Option<Option<u8>>",
        || vec![None, Some(None), Some(Some(1))],
        || vec![None, None, Some(Some(1))],
    );
    list.reads_as("Option<()>", || vec![None, Some(())], || vec![None, None]);
    list.same("Result", || vec![Ok(1_u8), Err("no".to_owned())]);
    list.same("Vec", || vec![vec![], vec![vec![String::new()], vec!["a".into(), "b".into()]]]);
    list.same("Vec<u8>", || vec![vec![], vec![0_u8, 255]]);
    list.same("VecDeque", || vec![VecDeque::from([1_u8, 2])]);
    list.same("BTreeSet", || vec![BTreeSet::from([1_u8, 2])]);
    list.same("HashSet", || vec![HashSet::from(["a".to_owned()])]);
    list.same("array", || vec![[1_u16, 256, 65_535]]);
    list.same("array without items", || vec![[0_u8; 0]]);
    list.same("tuple", || vec![(1_u8, "a".to_owned(), Some(0.5), [true], (), (('x',), -1_i64))]);
    list.same("Box", || vec![(Box::new(1_u8), Box::<str>::from("a"), Box::<[u8]>::from([1]))]);
    list.same("Cow", || vec![Cow::<'static, str>::Borrowed("a")]);
    list.same("Reverse", || vec![Reverse(1_u8)]);
    list.same("Bound, Range", || {
        vec![(Bound::Included(1_u8), Bound::<u8>::Unbounded, Range { start: 1, end: 2 })]
    });
    list.same("PhantomData", || vec![PhantomData::<u8>]);
}

fn keys<R: Report>(list: &mut List<R>) {
    list.same("HashMap<String, _>", || vec![HashMap::new(), HashMap::from([("a".to_owned(), 1_i64)])]);
    list.same("BTreeMap<String, _>", || {
        vec![BTreeMap::from([(String::new(), vec![1_u8]), ("ü".into(), vec![])])]
    });
    list.same("BTreeMap<u64, _>", || vec![BTreeMap::from([(0_u64, 'a'), (u64::MAX, 'b')])]);
    list.same("BTreeMap<i64, _>", || vec![BTreeMap::from([(i64::MIN, 'a'), (i64::MAX, 'b')])]);
    list.same("BTreeMap<bool, _>", || vec![BTreeMap::from([(true, 1_u8)])]);
    list.same("BTreeMap<char, _>", || vec![BTreeMap::from([('ü', 1_u8)])]);
    list.same("BTreeMap<enum, _>", || vec![BTreeMap::from([(Color::Red, 1_u8), (Color::DarkGreen, 2)])]);
    list.same("BTreeMap<Uuid, _>", || vec![BTreeMap::from([(Uuid::from_u128(7), 1_u8)])]);
    // Keys in JSON are text only.
    list.shape("BTreeMap<tuple, _>", || vec![BTreeMap::from([((1_u8, 2_u8), 1_u8)])], Same, Refused);
    list.shape("BTreeMap<Vec, _>", || vec![BTreeMap::from([(vec![1_u8], 1_u8)])], Same, Refused);
}

fn crates<R: Report>(list: &mut List<R>) {
    list.same("Duration", || vec![Duration::ZERO, Duration::new(u64::MAX, 999_999_999)]);
    list.same("SystemTime", || vec![SystemTime::UNIX_EPOCH + Duration::new(1, 1)]);
    list.same("PathBuf", || vec![PathBuf::from("/tmp/ü")]);
    list.same("DateTime<Utc>", || {
        vec![DateTime::<Utc>::UNIX_EPOCH, DateTime::from_timestamp_nanos(1_700_000_000_123_456_789)]
    });
    list.same("NaiveDate", || NaiveDate::from_ymd_opt(2024, 2, 29).into_iter().collect());
    list.same("Uuid", || vec![Uuid::nil(), Uuid::from_u128(7), Uuid::max()]);
    list.same("IpAddr", || vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
    list.same("SocketAddr", || {
        vec![SocketAddr::from(([127, 0, 0, 1], 80)), SocketAddr::from((Ipv6Addr::LOCALHOST, 80))]
    });
    list.same("serde_json::Value", || {
        vec![serde_json::json!({"a": [1, -2, 0.1, 0.5, null, true, "x", u64::MAX], "b": {"c": {}}})]
    });
    list.shape(
        "ciborium::Value, bytes",
        || vec![ciborium::Value::Bytes(vec![1])],
        Same,
        As(|| vec![ciborium::Value::Array(vec![1.into()])]),
    );
    list.shape(
        "ciborium::Value, map",
        || vec![ciborium::Value::Map(vec![("a".into(), 1.into())])],
        Same,
        Same,
    );
}

fn nesting<R: Report>(list: &mut List<R>) {
    list.same("serde_json::Value, 120 deep", || json(120));
    list.refused("serde_json::Value, 128 deep", || json(128));
    list.refused("serde_json::Value, 300 deep", || json(300));
    list.same("recursive struct, 120 deep", || nodes(120));
    list.refused("recursive struct, 5,000 deep", || nodes(5_000));
    // Only the last null of it is in the bytes.
    list.reads_as("recursive newtype, 100 deep", || layers(100), || layers(1));
    list.refused("recursive newtype, 5,000 deep", || layers(5_000));
}
