//! Conversion of stored data to JSON, without the types.

use std::collections::HashSet;

use ciborium::Value as Cbor;
use serde_json::{Map, Value, json};
use storied::{Codec, RecordedEvent};

/// Returns an event as JSON, and the cause if a part does not decode.
pub(crate) fn event(event: &RecordedEvent) -> (Value, Option<String>) {
    let (payload, unread) = part("payload", payload(event), &event.payload);
    let (metadata, unread_too) = part("metadata", cbor(&event.metadata), &event.metadata);
    let shown = json!({
        "position": event.position.get(),
        "recorded_at": event.recorded_at,
        "stream": event.stream.to_string(),
        "version": event.version.get(),
        "name": event.name.as_str(),
        "event_id": event.id,
        "command_id": event.command_id,
        "payload": payload,
        "metadata": metadata,
    });
    (shown, unread.or(unread_too))
}

fn part(what: &str, decoded: Result<Value, String>, bytes: &[u8]) -> (Value, Option<String>) {
    match decoded {
        Ok(value) => (value, None),
        Err(error) => (
            json!({ "$undecodable": error, "$bytes": hex(bytes) }),
            Some(format!("the {what} does not decode: {error}")),
        ),
    }
}

/// Returns the payload of either codec.
pub(crate) fn payload(event: &RecordedEvent) -> Result<Value, String> {
    match event.codec {
        Codec::Json => serde_json::from_slice(&event.payload).map_err(|error| error.to_string()),
        _ => cbor(&event.payload),
    }
}

/// Decodes one CBOR value without trailing bytes.
pub(crate) fn cbor(bytes: &[u8]) -> Result<Value, String> {
    Codec::Cbor.decode_value(bytes).map(|value| value_of(&value))
}

/// Converts a value; types without a JSON form become an object with one key that begins with `$`.
fn value_of(value: &Cbor) -> Value {
    match value {
        Cbor::Null => Value::Null,
        Cbor::Bool(truth) => (*truth).into(),
        Cbor::Integer(number) => {
            let number = i128::from(*number);
            let small =
                i64::try_from(number).map(Value::from).or_else(|_| u64::try_from(number).map(Value::from));
            small.unwrap_or_else(|_| json!({ "$integer": number.to_string() }))
        }
        Cbor::Float(number) => match serde_json::Number::from_f64(*number) {
            Some(number) => number.into(),
            None => json!({ "$float": number.to_string() }),
        },
        Cbor::Text(text) => text.as_str().into(),
        Cbor::Bytes(bytes) => json!({ "$bytes": hex(bytes) }),
        Cbor::Array(items) => items.iter().map(value_of).collect(),
        Cbor::Map(entries) => map(entries),
        Cbor::Tag(tag, value) => {
            let fields = [("$tag".to_owned(), (*tag).into()), ("$value".to_owned(), value_of(value))];
            Value::Object(fields.into_iter().collect())
        }
        other => json!({ "$unknown": format!("{other:?}") }),
    }
}

/// Converts a map to an object if its keys are unique JSON keys, otherwise to its entries.
///
/// Converts each entry once: twice on each level would take exponential time.
fn map(entries: &[(Cbor, Cbor)]) -> Value {
    let mut keys = HashSet::new();
    if entries.iter().all(|(key, _)| matches!(key, Cbor::Text(key) if keys.insert(key))) {
        let fields =
            entries.iter().filter_map(|(key, value)| Some((key.as_text()?.to_owned(), value_of(value))));
        return Value::Object(fields.collect());
    }
    let pairs = entries.iter().map(|(key, value)| Value::Array(vec![value_of(key), value_of(value)]));
    Value::Object(Map::from_iter([("$map".to_owned(), pairs.collect())]))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cbor_value_becomes_json() {
        for (value, shown) in [
            (Cbor::Null, json!(null)),
            (Cbor::Integer(u64::MAX.into()), json!(u64::MAX)),
            (Cbor::Integer((-5).into()), json!(-5)),
            (Cbor::Float(1.5), json!(1.5)),
            (Cbor::Float(f64::NAN), json!({ "$float": "NaN" })),
            (Cbor::Bytes(vec![0, 255]), json!({ "$bytes": "00ff" })),
            (Cbor::Tag(0, Box::new("x".into())), json!({ "$tag": 0, "$value": "x" })),
            (Cbor::Map(vec![("a".into(), Cbor::Array(vec![true.into()]))]), json!({ "a": [true] })),
            (Cbor::Map(vec![(1.into(), 2.into())]), json!({ "$map": [[1, 2]] })),
            (
                Cbor::Map(vec![("a".into(), 1.into()), ("a".into(), 2.into())]),
                json!({ "$map": [["a", 1], ["a", 2]] }),
            ),
        ] {
            let mut bytes = Vec::new();
            ciborium::into_writer(&value, &mut bytes).unwrap();
            assert_eq!(cbor(&bytes).unwrap(), shown);
            bytes.push(0);
            assert!(cbor(&bytes).is_err());
        }
        assert_eq!(
            value_of(&Cbor::Integer((-(1_i128 << 64)).try_into().unwrap())),
            json!({ "$integer": "-18446744073709551616" })
        );
        assert!(cbor(&[0xff, 0]).is_err() && cbor(&[]).is_err());
    }
    #[test]
    fn deep_nesting_takes_linear_time() {
        let deep = |wrap: fn(Cbor) -> Cbor| {
            let value = (0..200).fold(Cbor::Null, |value, _| wrap(value));
            let mut bytes = Vec::new();
            ciborium::into_writer(&value, &mut bytes).unwrap();
            cbor(&bytes).map(|value| value.to_string().matches('{').count())
        };
        let twice = |value| Cbor::Map(vec![("a".into(), value), ("a".into(), Cbor::Null)]);
        assert_eq!(deep(twice), Ok(200));
        assert_eq!(deep(|value| Cbor::Map(vec![("a".into(), value), (1.into(), Cbor::Null)])), Ok(200));
        assert_eq!(deep(|value| Cbor::Map(vec![(value, Cbor::Null)])), Ok(200));
    }
}
