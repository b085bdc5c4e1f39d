//! Encodes the events and the reply of a decision, and decodes a stored reply.

use std::any::type_name;

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::decision::Decision;
use crate::codec::{Codec, from_cbor, to_cbor};
use crate::event::{EncodeError, Event, EventTypes, Metadata, NewEvent};

/// CBOR's null: a reply without content (`()`). It is not stored.
const NO_REPLY: [u8; 1] = [0xf6];

/// The command of a decision.
pub(crate) struct DecidedCommand<'a> {
    pub(crate) id: Uuid,
    /// Fingerprint of the content. It detects the reuse of an id for another command.
    pub(crate) content: u64,
    pub(crate) metadata: &'a Metadata,
}

/// A decision in the form that is stored.
pub(crate) struct EncodedDecision<E, R> {
    /// Events for the store.
    pub(crate) events: Vec<NewEvent>,
    /// Events in the form that a reader will decode.
    pub(crate) read: Vec<E>,
    /// Reply in the form that a repeated command will get.
    pub(crate) reply: R,
}

impl<E: Event, R: Serialize + DeserializeOwned> EncodedDecision<E, R> {
    /// Encodes a decision. Its last event carries the reply and the fingerprint of the command.
    pub(crate) fn new(
        types: &EventTypes,
        codec: Codec,
        command: &DecidedCommand<'_>,
        decision: Decision<E, R>,
    ) -> Result<Self, EncodeError> {
        let metadata = command.metadata.encode()?;
        let count = decision.events.len();
        let (mut events, mut read) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for event in &decision.events {
            let tags = event.tags();
            tags.check()?;
            let (name, payload, event) = types.encode(event, codec)?;
            read.push(event);
            events.push(NewEvent {
                id: Uuid::now_v7(),
                name,
                payload,
                command_id: command.id,
                correlation_id: command.metadata.correlation_id,
                metadata: metadata.clone(),
                tags,
            });
        }
        let stored = to_cbor(&decision.reply)?;
        let (stored, reply) = if stored == NO_REPLY {
            (Vec::new(), decision.reply)
        } else {
            let decoded = from_cbor(&stored).map_err(|reason| EncodeError::NotReadable {
                what: format!("the reply {}", type_name::<R>()),
                field: "its content".into(),
                reason,
                remedy: "change the reply type so that serde can read the form that it writes",
            })?;
            (stored, decoded)
        };
        if let Some(last) = events.last_mut() {
            let content = Some(command.content);
            last.metadata = Metadata { reply: stored, content, ..command.metadata.clone() }.encode()?;
        }
        Ok(Self { events, read, reply })
    }
}

/// Decodes the reply in the metadata of a command's last event.
pub(super) fn decode_reply<R: DeserializeOwned>(metadata: &Metadata) -> Result<R, String> {
    from_cbor(if metadata.reply.is_empty() { &NO_REPLY } else { &metadata.reply })
}
