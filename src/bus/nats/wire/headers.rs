//! The names of the headers of a message, and the reader of their values.

use async_nats::HeaderMap;
use async_nats::header::{HeaderName, HeaderValue, NATS_MESSAGE_ID};
use uuid::Uuid;

use super::reject::{Reject, malformed};
use crate::event::Position;

pub(super) const WIRE: HeaderName = HeaderName::from_static("Storied-Wire");
pub(super) const STORE: HeaderName = HeaderName::from_static("Storied-Store");
pub(super) const POSITION: HeaderName = HeaderName::from_static("Storied-Position");
pub(super) const PREVIOUS: HeaderName = HeaderName::from_static("Storied-Previous");
pub(super) const STREAM: HeaderName = HeaderName::from_static("Storied-Stream");
pub(super) const VERSION: HeaderName = HeaderName::from_static("Storied-Version");
pub(super) const EVENT: HeaderName = HeaderName::from_static("Storied-Event");
pub(super) const TIME: HeaderName = HeaderName::from_static("Storied-Time");
pub(super) const COMMAND: HeaderName = HeaderName::from_static("Storied-Command");
pub(super) const CORRELATION: HeaderName = HeaderName::from_static("Storied-Correlation");
pub(super) const CODEC: HeaderName = HeaderName::from_static("Storied-Codec");
pub(super) const BODY: HeaderName = HeaderName::from_static("Storied-Body");
pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(super) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Number of this format.
pub(super) const FORMAT: &str = "1";

/// Value of `Storied-Body` if an event is too large for a message.
pub(super) const OMITTED: &str = "omitted";

/// Returns the headers if they are of this format.
pub(super) fn in_format(headers: Option<&HeaderMap>) -> Result<&HeaderMap, Reject> {
    let headers = headers.ok_or_else(|| malformed("missing headers".into()))?;
    match headers.get(WIRE) {
        Some(format) if format.as_str() == FORMAT => Ok(headers),
        Some(format) => Err(malformed(format!("unknown wire format {:?}", format.as_str()))),
        None => Err(malformed("missing header Storied-Wire".into())),
    }
}

pub(super) struct Headers<'a>(pub(super) &'a HeaderMap);

impl<'a> Headers<'a> {
    pub(super) fn text(&self, name: &HeaderName) -> Result<&'a str, Reject> {
        let value = self.0.get(name.clone()).map(HeaderValue::as_str);
        value.ok_or_else(|| malformed(format!("missing header {name}")))
    }

    pub(super) fn number(&self, name: &HeaderName) -> Result<u64, Reject> {
        self.text(name)?.parse().map_err(|error| malformed(format!("{name}: {error}")))
    }

    pub(super) fn uuid(&self, name: &HeaderName) -> Result<Uuid, Reject> {
        Uuid::try_parse(self.text(name)?).map_err(|error| malformed(format!("{name}: {error}")))
    }

    /// The id of the event at `position`.
    /// The message id is `ID`, or `ID@POSITION` if the log has the id twice.
    pub(super) fn event_id(&self, position: Position) -> Result<Uuid, Reject> {
        let text = self.text(&NATS_MESSAGE_ID)?;
        let id = match text.split_once('@') {
            Some((id, at)) if at.parse() == Ok(position.get()) => id,
            Some(_) => return Err(malformed(format!("{NATS_MESSAGE_ID}: not of position {position}"))),
            None => text,
        };
        Uuid::try_parse(id).map_err(|error| malformed(format!("{NATS_MESSAGE_ID}: {error}")))
    }
}
