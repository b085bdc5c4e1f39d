//! Encodes events for a store, and decodes recorded ones.

use std::any::type_name;

use chrono::DateTime;
use serde::Serialize;
use uuid::Uuid;

use super::Event;
use super::error::{DecodeError, EncodeError};
use super::metadata::Metadata;
use super::name::EventName;
use super::position::{Position, Version};
use super::recorded::{NewEvent, RecordedEvent};
use super::set::{EventDecoder, EventSet};
use super::stream::StreamId;
use super::tags::Tags;
use super::types::EventTypes;
use crate::codec::{Codec, encode_variant};

impl NewEvent {
    /// Encodes `event` for a store that keeps payloads in `codec`, with a new id and command id.
    ///
    /// # Errors
    /// If the event does not serialize, cannot be read back, or is no externally tagged enum.
    pub fn encode<E: Event>(event: &E, codec: Codec, metadata: &Metadata) -> Result<Self, EncodeError> {
        let (name, payload, _) = EventTypes::of::<E>()?.encode(event, codec)?;
        let tags = event.tags();
        tags.check()?;
        Ok(Self {
            id: Uuid::now_v7(),
            name,
            payload,
            command_id: Uuid::now_v7(),
            correlation_id: metadata.correlation_id,
            metadata: metadata.encode()?,
            tags,
        })
    }
}

impl NewEvent {
    /// Returns the event as a reader gets it, but without a version and a position.
    pub(crate) fn to_recorded(&self, stream: StreamId, codec: Codec) -> RecordedEvent {
        RecordedEvent {
            id: self.id,
            stream,
            version: Version::NONE,
            position: Position::START,
            name: self.name.clone(),
            codec,
            payload: self.payload.clone(),
            command_id: self.command_id,
            metadata: self.metadata.clone(),
            recorded_at: DateTime::UNIX_EPOCH,
        }
    }

    /// Encodes a variant as an event of a category that is known only at run time.
    pub(crate) fn of_variant<E: Serialize>(
        category: &str,
        event: &E,
        codec: Codec,
        metadata: &Metadata,
    ) -> Result<Self, EncodeError> {
        let no_enum =
            |reason: &str| EncodeError::NoEnum { type_name: type_name::<E>(), reason: reason.into() };
        let (variant, payload) = encode_variant(event, codec)?
            .ok_or_else(|| no_enum("the value does not serialize to a variant"))?;
        Ok(Self {
            id: Uuid::now_v7(),
            name: EventName::new(format!("{category}.{}", variant.as_ref()))?,
            payload,
            command_id: Uuid::now_v7(),
            correlation_id: metadata.correlation_id,
            metadata: metadata.encode()?,
            tags: Tags::new(),
        })
    }
}

impl RecordedEvent {
    /// Decodes the event as an event type or a set of event types, after upcasting.
    ///
    /// # Errors
    /// If the event is of another category, its type has no such name, or the bytes do not decode.
    /// The error names stream, version and event.
    pub fn decode<S: EventSet>(&self) -> Result<S, DecodeError> {
        EventDecoder::of_set().decode(self)
    }

    /// Decodes the event as `E`, or returns `None` if it belongs to another category.
    ///
    /// For readers of several aggregates, see also [`EventSet`](super::EventSet).
    ///
    /// # Errors
    /// As [`decode`](Self::decode), except for the category.
    pub fn decode_if<E: Event>(&self) -> Result<Option<E>, DecodeError> {
        if self.stream.category() == E::CATEGORY { self.decode().map(Some) } else { Ok(None) }
    }

    /// Decodes correlation, trace context and the entries of the user.
    ///
    /// # Errors
    /// If the stored bytes are no metadata.
    pub fn decode_metadata(&self) -> Result<Metadata, DecodeError> {
        Metadata::decode(&self.metadata).map_err(|error| DecodeError::metadata(self, error))
    }
}
