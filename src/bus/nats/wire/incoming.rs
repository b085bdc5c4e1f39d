//! A received message, and how it is decoded.

use async_nats::{HeaderMap, Message};
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::body::read_body;
use super::headers::{
    BODY, CODEC, COMMAND, EVENT, Headers, OMITTED, POSITION, PREVIOUS, STORE, STREAM, TIME, VERSION,
    in_format,
};
use super::reject::{Reject, malformed};
use super::stream_header::read_stream;
use crate::codec::Codec;
use crate::event::{EventName, Position, RecordedEvent, Version};

/// A received message.
#[derive(Debug)]
pub(in crate::bus::nats) enum Incoming {
    Event {
        /// Position of the previous event in the log, whatever its name.
        previous: Position,
        event: RecordedEvent,
    },
    /// An event at this position that was too large for a message.
    Large(Position),
}

/// Decodes the message of an event of any store, and returns the id of the store.
pub(in crate::bus::nats) fn read_any(message: &Message) -> Result<(Uuid, Incoming), Reject> {
    let headers = in_format(message.headers.as_ref())?;
    Ok((Headers(headers).uuid(&STORE)?, read(message, headers)?))
}

/// The position in a message's headers, if there is one. Used to order messages.
pub(in crate::bus::nats) fn position_of(message: &Message) -> Option<u64> {
    message.headers.as_ref()?.get(POSITION)?.as_str().parse().ok()
}

pub(super) fn read(message: &Message, headers: &HeaderMap) -> Result<Incoming, Reject> {
    let headers = Headers(headers);
    let position = Position::new(headers.number(&POSITION)?);
    if headers.0.get(BODY).is_some_and(|body| body.as_str() == OMITTED) {
        return Ok(Incoming::Large(position));
    }
    let previous = Position::new(headers.number(&PREVIOUS)?);
    if previous >= position {
        return Err(malformed(format!("position {position} is not after its previous position {previous}")));
    }
    let codec = headers.text(&CODEC)?;
    let codec = Codec::from_name(codec).ok_or_else(|| malformed(format!("unknown codec {codec:?}")))?;
    let (payload, metadata) = read_body(&message.payload, codec)
        .ok_or_else(|| malformed(format!("invalid body of position {position}")))?;
    let event = RecordedEvent {
        id: headers.event_id(position)?,
        stream: read_stream(headers.text(&STREAM)?).ok_or_else(|| malformed("invalid stream".into()))?,
        version: Version::new(headers.number(&VERSION)?),
        position,
        name: EventName::new(headers.text(&EVENT)?).map_err(|error| malformed(error.to_string()))?,
        codec,
        payload,
        command_id: headers.uuid(&COMMAND)?,
        metadata,
        recorded_at: DateTime::parse_from_rfc3339(headers.text(&TIME)?)
            .map_err(|error| malformed(format!("invalid time: {error}")))?
            .with_timezone(&Utc),
    };
    Ok(Incoming::Event { previous, event })
}
