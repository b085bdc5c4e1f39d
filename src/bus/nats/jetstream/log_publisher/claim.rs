//! Reads the events that the messages of the log stream claim to be.

use std::error::Error;

use async_nats::jetstream::Context;
use async_nats::jetstream::context::RequestError;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, RawMessageError, Stream};

use super::super::stream::refused;
use crate::bus::nats::errors::unavailable;
use crate::bus::nats::wire::{Reject, Wire};
use crate::bus::{BusError, ClaimedEvent};

pub(super) async fn stream_of(jetstream: &Context, name: &str) -> Result<Stream<()>, BusError> {
    let stream = jetstream.get_stream_no_info(name).await;
    stream.map_err(|error| unavailable(format!("reading the stream {name}"), error))
}

/// Reads the event that a message claims to be, and the other store that it names.
pub(super) async fn read_claim(
    stream: &Stream<()>,
    wire: &Wire,
    name: &str,
    sequence: u64,
) -> Result<(ClaimedEvent, Option<String>), BusError> {
    let message: Result<StreamMessage, RawMessageError> = stream.get_raw_message(sequence).await;
    let reject = match message {
        Ok(message) => match wire.read_claim(&message.headers) {
            Ok(event) => return Ok((event, None)),
            Err(reject) => reject,
        },
        Err(error) => {
            let what = || format!("reading message {sequence} of the stream {name}");
            match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => return Ok((ClaimedEvent::Missing, None)),
                LastRawMessageErrorKind::JetStream(error) => return Err(refused(&what(), error)),
                _ if error.source().is_none_or(|source| source.is::<RequestError>()) => {
                    return Err(unavailable(what(), error));
                }
                // The answer has an unreadable message, which cannot be of storied.
                _ => Reject::Malformed(error.to_string()),
            }
        }
    };
    tracing::debug!(
        stream = name,
        sequence,
        ?reject,
        "found a message in the log stream that is no event of this log"
    );
    match reject {
        Reject::OtherStore(store) => Ok((ClaimedEvent::Foreign, Some(store))),
        Reject::Malformed(_) => Ok((ClaimedEvent::Foreign, None)),
    }
}
