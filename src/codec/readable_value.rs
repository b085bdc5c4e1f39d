//! The readable form of values whose types are unknown.

use std::collections::HashSet;

use ciborium::Value;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// A CBOR value that serializes in a form that JSON can carry.
///
/// A value without such a form becomes a map with a key that begins with `$`.
pub(crate) struct ReadableValue<'a>(pub(crate) &'a Value);

impl Serialize for ReadableValue<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Null => serializer.serialize_unit(),
            Value::Bool(truth) => serializer.serialize_bool(*truth),
            Value::Integer(number) => integer(i128::from(*number), serializer),
            Value::Float(number) if number.is_finite() => serializer.serialize_f64(*number),
            Value::Float(number) => entry("$float", &number.to_string(), serializer),
            Value::Text(text) => serializer.serialize_str(text),
            Value::Bytes(bytes) => entry("$bytes", &hex(bytes), serializer),
            Value::Array(items) => serializer.collect_seq(items.iter().map(ReadableValue)),
            Value::Map(entries) => map(entries, serializer),
            Value::Tag(tag, value) => {
                let mut fields = serializer.serialize_map(Some(2))?;
                fields.serialize_entry("$tag", tag)?;
                fields.serialize_entry("$value", &ReadableValue(value))?;
                fields.end()
            }
            other => entry("$unknown", &format!("{other:?}"), serializer),
        }
    }
}

/// Writes a map with one entry.
fn entry<T: Serialize, S: Serializer>(key: &str, value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map([(key, value)])
}

fn integer<S: Serializer>(number: i128, serializer: S) -> Result<S::Ok, S::Error> {
    if let Ok(number) = u64::try_from(number) {
        serializer.serialize_u64(number)
    } else if let Ok(number) = i64::try_from(number) {
        serializer.serialize_i64(number)
    } else {
        entry("$integer", &number.to_string(), serializer)
    }
}

/// Writes a map if its keys are unique texts, otherwise its entries.
///
/// Writes each entry once: twice on each level would take exponential time.
fn map<S: Serializer>(entries: &[(Value, Value)], serializer: S) -> Result<S::Ok, S::Error> {
    let mut keys = HashSet::new();
    if entries.iter().all(|(key, _)| matches!(key, Value::Text(key) if keys.insert(key))) {
        return serializer
            .collect_map(entries.iter().map(|(key, value)| (ReadableValue(key), ReadableValue(value))));
    }
    let pairs: Vec<_> =
        entries.iter().map(|(key, value)| [ReadableValue(key), ReadableValue(value)]).collect();
    entry("$map", &pairs, serializer)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that do not decode, in place of their value.
#[derive(Serialize)]
pub(crate) struct Undecodable {
    #[serde(rename = "$undecodable")]
    reason: String,
    #[serde(rename = "$bytes")]
    bytes: String,
}

impl Undecodable {
    pub(crate) fn new(reason: String, bytes: &[u8]) -> Self {
        Self { reason, bytes: hex(bytes) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_value_has_a_form_in_json() {
        for (value, form) in [
            (Value::Null, json!(null)),
            (Value::Integer(u64::MAX.into()), json!(u64::MAX)),
            (Value::Integer((-5).into()), json!(-5)),
            (
                Value::Integer((-(1_i128 << 64)).try_into().unwrap()),
                json!({ "$integer": "-18446744073709551616" }),
            ),
            (Value::Float(1.5), json!(1.5)),
            (Value::Float(f64::NAN), json!({ "$float": "NaN" })),
            (Value::Bytes(vec![0, 255]), json!({ "$bytes": "00ff" })),
            (Value::Tag(0, Box::new("x".into())), json!({ "$tag": 0, "$value": "x" })),
            (Value::Map(vec![("a".into(), Value::Array(vec![true.into()]))]), json!({ "a": [true] })),
            (Value::Map(vec![(1.into(), 2.into())]), json!({ "$map": [[1, 2]] })),
            (
                Value::Map(vec![("a".into(), 1.into()), ("a".into(), 2.into())]),
                json!({ "$map": [["a", 1], ["a", 2]] }),
            ),
        ] {
            assert_eq!(serde_json::to_value(ReadableValue(&value)).unwrap(), form);
        }
    }

    #[test]
    fn deep_nesting_takes_linear_time() {
        let maps = |wrap: fn(Value) -> Value| {
            let value = (0..100).fold(Value::Null, |value, _| wrap(value));
            serde_json::to_string(&ReadableValue(&value)).unwrap().matches('{').count()
        };
        assert_eq!(maps(|value| Value::Map(vec![("a".into(), value), ("a".into(), Value::Null)])), 100);
        assert_eq!(maps(|value| Value::Map(vec![("a".into(), value), (1.into(), Value::Null)])), 100);
        assert_eq!(maps(|value| Value::Map(vec![(value, Value::Null)])), 100);
    }
}
