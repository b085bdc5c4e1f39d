//! Serializes recorded events for readers without their types.

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::metadata::Metadata;
use super::recorded::RecordedEvent;
use crate::codec::{ReadableValue, Undecodable};

impl Serialize for RecordedEvent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut form = serializer.serialize_struct("RecordedEvent", 10)?;
        form.serialize_field("position", &self.position)?;
        form.serialize_field("recorded_at", &self.recorded_at)?;
        form.serialize_field("stream", &self.stream)?;
        form.serialize_field("version", &self.version)?;
        form.serialize_field("name", &self.name)?;
        form.serialize_field("event_id", &self.id)?;
        form.serialize_field("command_id", &self.command_id)?;
        form.serialize_field("codec", &self.codec)?;
        match self.codec.decode_value(&self.payload) {
            Ok(value) => form.serialize_field("payload", &ReadableValue(&value))?,
            Err(error) => form.serialize_field("payload", &Undecodable::new(error, &self.payload))?,
        }
        match Metadata::decode(&self.metadata) {
            Ok(metadata) => {
                let metadata = Metadata { reply: Vec::new(), content: None, ..metadata };
                form.serialize_field("metadata", &metadata)?;
            }
            Err(error) => form.serialize_field("metadata", &Undecodable::new(error, &self.metadata))?,
        }
        form.end()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;
    use uuid::Uuid;

    use super::*;
    use crate::codec::Codec;
    use crate::event::tests::recorded;

    #[test]
    fn an_event_is_readable_without_its_types() {
        let mut event = recorded(7, 0);
        event.payload = Bytes::from_static(b"\xa1\x62id\x42\x00\xff");
        let metadata = Metadata {
            correlation_id: Some(Uuid::nil()),
            reply: vec![1],
            content: Some(1),
            ..Metadata::default()
        };
        event.metadata = metadata.encode().unwrap();
        let nil = "00000000-0000-0000-0000-000000000000";
        let mut form = json!({
            "position": 7,
            "recorded_at": "1970-01-01T00:00:00Z",
            "stream": "test/1",
            "version": 7,
            "name": "test.happened",
            "event_id": nil,
            "command_id": nil,
            "codec": "cbor",
            "payload": { "id": { "$bytes": "00ff" } },
            "metadata": { "correlation": nil },
        });
        assert_eq!(serde_json::to_value(&event).unwrap(), form);
        event.codec = Codec::Json;
        event.payload = Bytes::from_static(b"[0.5]");
        (form["codec"], form["payload"]) = (json!("json"), json!([0.5]));
        assert_eq!(serde_json::to_value(&event).unwrap(), form);
    }

    #[test]
    fn an_undecodable_part_has_its_reason_and_its_bytes() {
        let mut event = recorded(7, 0);
        event.payload = Bytes::from_static(b"\x00\xff");
        let form = serde_json::to_value(&event).unwrap();
        assert_eq!(form["payload"], json!({ "$undecodable": "1 trailing bytes", "$bytes": "00ff" }));
        assert_eq!(form["metadata"]["$bytes"], "");
        assert!(form["metadata"]["$undecodable"].is_string());
    }
}
