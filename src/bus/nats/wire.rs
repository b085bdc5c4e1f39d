//! The wire format of messages, as `docs/wire-format.md` specifies it byte by byte.
//!
//! A change here needs a new number in `Storied-Wire`.

mod body;
mod headers;
mod incoming;
mod reject;
mod stream_header;

use async_nats::header::{HeaderValue, NATS_MESSAGE_ID};
use async_nats::{HeaderMap, Message};
use bytes::Bytes;
use chrono::SecondsFormat;
use uuid::Uuid;

use self::body::body;
use self::headers::{
    BODY, CODEC, COMMAND, CORRELATION, EVENT, FORMAT, Headers, OMITTED, POSITION, PREVIOUS, STORE, STREAM,
    TIME, TRACEPARENT, TRACESTATE, VERSION, WIRE, in_format,
};
use self::incoming::read;
pub(super) use self::incoming::{Incoming, position_of, read_any};
pub(super) use self::reject::Reject;
use self::reject::malformed;
pub(super) use self::stream_header::percent_decoded;
use self::stream_header::stream_header;
use super::subjects::{Mapping, Names};
use crate::bus::{BusError, ClaimedEvent};
use crate::event::{Position, RecordedEvent};

/// Upper bound of the headers and the frame of any message, in bytes.
const HEADROOM: usize = 4_096;

/// Maximum length of a `traceparent` header; the standard's has 55 bytes.
/// A longer one is in the metadata only.
const LONGEST_TRACEPARENT: usize = 256;

/// Maximum length of a `tracestate` header. The standard asks to forward up to this length.
const LONGEST_TRACESTATE: usize = 512;

/// The encoder and decoder of the messages of one store's log.
#[derive(Debug, Clone)]
pub(super) struct Wire {
    mapping: Mapping,
    head: String,
    hints: String,
    store: HeaderValue,
    store_id: Uuid,
}

/// A message to be sent.
pub(super) struct Outgoing {
    pub(super) subject: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Wire {
    pub(super) fn new(names: &Names, store: Uuid) -> Self {
        Self {
            mapping: names.mapping.clone(),
            head: names.head(),
            hints: names.hints(),
            store: HeaderValue::from(store.hyphenated().to_string()),
            store_id: store,
        }
    }

    /// The subjects that match all events.
    pub(super) fn events(&self) -> &[String] {
        self.mapping.all()
    }

    /// Subject of heartbeats, which carry the end of the log.
    pub(super) fn head(&self) -> &str {
        &self.head
    }

    /// Subject of hints about commits.
    pub(super) fn hints(&self) -> &str {
        &self.hints
    }

    pub(super) fn store_id(&self) -> Uuid {
        self.store_id
    }

    /// Encodes `event`, which follows `previous` in the log.
    /// Omits the content if the message would exceed `largest` bytes.
    pub(super) fn event(
        &self,
        event: &RecordedEvent,
        previous: Position,
        largest: usize,
    ) -> Result<Outgoing, BusError> {
        let mut headers = self.headers(event.position);
        headers.insert(NATS_MESSAGE_ID, event.id.hyphenated().to_string());
        headers.insert(PREVIOUS, HeaderValue::from(previous.get()));
        headers.insert(STREAM, stream_header(&event.stream));
        headers.insert(VERSION, HeaderValue::from(event.version.get()));
        headers.insert(EVENT, event.name.as_str());
        headers.insert(TIME, event.recorded_at.to_rfc3339_opts(SecondsFormat::Nanos, true));
        headers.insert(COMMAND, event.command_id.hyphenated().to_string());
        headers.insert(CODEC, event.codec.name());
        self.context(event, &mut headers);
        let body = if event.payload.len() + event.metadata.len() + HEADROOM > largest {
            headers.insert(BODY, OMITTED);
            Bytes::new()
        } else {
            body(event)
        };
        Ok(Outgoing { subject: self.mapping.subject(&event.name, &event.stream)?, headers, body })
    }

    /// Encodes a heartbeat with the end of the log.
    pub(super) fn heartbeat(&self, head: Position) -> Outgoing {
        Outgoing { subject: self.head.clone(), headers: self.headers(head), body: Bytes::new() }
    }

    /// Encodes a hint about new events.
    pub(super) fn hint(&self) -> Outgoing {
        Outgoing { subject: self.hints.clone(), headers: self.own_headers(), body: Bytes::new() }
    }

    /// Whether a message is of this store, whatever its content.
    pub(super) fn is_ours(&self, headers: Option<&HeaderMap>) -> bool {
        self.accept(headers).is_ok()
    }

    fn own_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(WIRE, FORMAT);
        headers.insert(STORE, self.store.clone());
        headers
    }

    fn headers(&self, position: Position) -> HeaderMap {
        let mut headers = self.own_headers();
        headers.insert(POSITION, HeaderValue::from(position.get()));
        headers
    }

    /// Adds correlation and trace context to the headers, for programs that read only headers.
    fn context(&self, event: &RecordedEvent, headers: &mut HeaderMap) {
        /// An empty map: most events have no metadata of their own.
        const NOTHING: &[u8] = &[0xa0];
        if event.metadata == NOTHING {
            return;
        }
        // Metadata that does not decode is sent unchanged. A reader that decodes it gets the error.
        let Ok(metadata) = event.decode_metadata() else { return };
        if let Some(correlation) = metadata.correlation_id {
            headers.insert(CORRELATION, correlation.hyphenated().to_string());
        }
        let printable = |text: &String| text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        let traces = [
            (TRACEPARENT, metadata.traceparent, LONGEST_TRACEPARENT),
            (TRACESTATE, metadata.tracestate, LONGEST_TRACESTATE),
        ];
        for (name, trace, longest) in traces {
            if let Some(trace) = trace.filter(printable).filter(|trace| trace.len() <= longest) {
                headers.insert(name, trace);
            }
        }
    }

    /// Decodes the message of an event.
    pub(super) fn read(&self, message: &Message) -> Result<Incoming, Reject> {
        read(message, self.accept(message.headers.as_ref())?)
    }

    /// Decodes the position in the headers of an event or a heartbeat.
    pub(super) fn read_position(&self, headers: Option<&HeaderMap>) -> Result<Position, Reject> {
        Headers(self.accept(headers)?).number(&POSITION).map(Position::new)
    }

    /// Decodes which event the headers of a message claim.
    pub(super) fn read_claim(&self, headers: &HeaderMap) -> Result<ClaimedEvent, Reject> {
        let headers = Headers(self.accept(Some(headers))?);
        let position = Position::new(headers.number(&POSITION)?);
        let previous = Position::new(headers.number(&PREVIOUS)?);
        Ok(ClaimedEvent::Event { previous, position, id: headers.event_id(position)? })
    }

    /// The message id of an event if the server has the event's own id already.
    pub(super) fn message_id_at_position(event: &RecordedEvent) -> String {
        format!("{}@{}", event.id.hyphenated(), event.position)
    }

    /// Returns the headers if they are of this format and store.
    fn accept<'a>(&self, headers: Option<&'a HeaderMap>) -> Result<&'a HeaderMap, Reject> {
        let headers = in_format(headers)?;
        match headers.get(STORE) {
            Some(store) if *store == self.store => Ok(headers),
            Some(store) => Err(Reject::OtherStore(store.as_str().to_owned())),
            None => Err(malformed("missing header Storied-Store".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use async_nats::header::HeaderName;
    use chrono::Utc;
    use proptest::prelude::*;

    use super::*;
    use crate::bus::nats::subjects::Subjects;
    use crate::codec::Codec;
    use crate::event::{EventName, Metadata, StreamId, Version};

    fn event(id: &str, codec: Codec, payload: Vec<u8>, metadata: Vec<u8>) -> RecordedEvent {
        RecordedEvent {
            id: Uuid::now_v7(),
            stream: StreamId::new("shop.order", id).unwrap(),
            version: Version::new(3),
            position: Position::new(9),
            name: EventName::new("shop.order.placed").unwrap(),
            codec,
            payload: payload.into(),
            command_id: Uuid::now_v7(),
            metadata: metadata.into(),
            recorded_at: Utc::now(),
        }
    }

    fn wire(namespace: &str, store: Uuid) -> Wire {
        Wire::new(&Names::new(namespace, &Subjects::new()), store)
    }

    fn incoming(outgoing: Outgoing) -> Message {
        Message {
            subject: outgoing.subject.into(),
            reply: None,
            payload: outgoing.body,
            headers: Some(outgoing.headers),
            status: None,
            description: None,
            length: 0,
        }
    }

    #[test]
    fn headers_have_the_trace_context_within_their_limits() {
        let wire = wire("shop", Uuid::now_v7());
        let sent = |state: &str| {
            let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned();
            let (traceparent, tracestate) = (Some(trace), Some(state.to_owned()));
            let metadata = Metadata { traceparent, tracestate, ..Metadata::default() }.encode().unwrap();
            let event = event("1", Codec::Cbor, vec![0xa0], metadata.to_vec());
            let headers = wire.event(&event, Position::START, 1 << 20).unwrap().headers;
            assert!(headers.get("traceparent").is_some());
            headers.get("tracestate").map(|state| state.as_str().to_owned())
        };
        assert_eq!(sent("vendor=value").as_deref(), Some("vendor=value"));
        assert_eq!(sent(&"v".repeat(512)).map(|state| state.len()), Some(512));
        assert_eq!(sent(&"v".repeat(513)), None);
        assert_eq!(sent("a\r\nStored: by another program"), None);
    }

    proptest! {
        #[test]
        fn encoded_events_decode_unchanged(
            id in "[ -~éß→%/]{1,40}",
            payload in proptest::collection::vec(any::<u8>(), 0..70_000),
            metadata in proptest::collection::vec(any::<u8>(), 0..300),
            json in any::<bool>(),
        ) {
            let wire = wire("shop", Uuid::now_v7());
            let sent = event(&id, if json { Codec::Json } else { Codec::Cbor }, payload, metadata);
            let message = incoming(wire.event(&sent, Position::new(7), 1 << 20).unwrap());
            let Ok(Incoming::Event { previous, event: read }) = wire.read(&message) else { panic!("{message:?}") };
            prop_assert_eq!(previous.get(), 7);
            prop_assert_eq!(format!("{sent:?}"), format!("{read:?}"));
        }

        #[test]
        fn decoding_never_panics_on_any_body(body in proptest::collection::vec(any::<u8>(), 0..64), keep in 0_usize..64) {
            let wire = wire("shop", Uuid::now_v7());
            let mut message = incoming(wire.event(&event("1", Codec::Cbor, vec![1; 30], vec![0xa0]), Position::START, 1 << 20).unwrap());
            let kept = message.payload.slice(..keep.min(message.payload.len()));
            message.payload = [kept.as_ref(), &body].concat().into();
            let _ = wire.read(&message);
        }
    }

    #[test]
    fn other_stores_formats_and_malformed_messages_are_distinguished() {
        let wire = wire("shop", Uuid::now_v7());
        let sent = || event("1", Codec::Cbor, vec![1], vec![0xa0]);
        let other = Uuid::now_v7();
        let foreign =
            incoming(super::tests::wire("shop", other).event(&sent(), Position::START, 1 << 20).unwrap());
        assert_eq!(wire.read(&foreign).unwrap_err(), Reject::OtherStore(other.to_string()));
        for (name, value) in [
            ("Storied-Wire", "2"),
            ("Storied-Position", "-1"),
            ("Storied-Previous", "9"),
            ("Storied-Stream", "order"),
            ("Storied-Stream", "order/%zz"),
            ("Storied-Codec", "gob"),
            ("Storied-Time", "today"),
            ("Storied-Event", ".."),
            ("Nats-Msg-Id", "1"),
        ] {
            let mut outgoing = wire.event(&sent(), Position::START, 1 << 20).unwrap();
            outgoing.headers.insert(name, value);
            let read = wire.read(&incoming(outgoing));
            assert!(matches!(read, Err(Reject::Malformed(_))), "{name}: {value}: {read:?}");
        }
    }

    #[test]
    fn a_large_event_travels_without_its_content() {
        let wire = wire("shop", Uuid::now_v7());
        let sent = event("1", Codec::Cbor, vec![1; 2_000], vec![0xa0]);
        let outgoing = wire.event(&sent, Position::START, 6_000).unwrap();
        assert!(outgoing.body.is_empty());
        assert!(
            matches!(wire.read(&incoming(outgoing)), Ok(Incoming::Large(position)) if position.get() == 9)
        );
    }

    /// One header per line, an empty line, the body.
    fn message(bytes: &[u8]) -> Message {
        let end = bytes.windows(2).position(|two| two == b"\n\n").unwrap_or(bytes.len());
        let (head, body) = bytes.split_at(end);
        let mut headers = HeaderMap::new();
        for line in String::from_utf8_lossy(head).lines() {
            let Some((name, value)) = line.split_once(": ") else { continue };
            let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.parse::<HeaderValue>()) else {
                continue;
            };
            headers.insert(name, value);
        }
        let body = body.get(2..).unwrap_or_default().to_vec().into();
        incoming(Outgoing { subject: "shop.events.x".into(), headers, body })
    }

    #[test]
    fn decoding_never_panics_on_any_message() {
        let (store, mut seeds) = (Uuid::now_v7(), Vec::new());
        let wire = wire("shop", store);
        for (codec, limit) in [(Codec::Cbor, 1 << 20), (Codec::Json, 1 << 20), (Codec::Cbor, 0)] {
            let sent = wire.event(&event("a/é", codec, vec![b'1'; 300], vec![0xa0]), Position::new(7), limit);
            let Ok(Outgoing { headers, body, .. }) = sent else { continue };
            let head: Vec<String> =
                headers.iter().map(|(name, values)| format!("{name}: {}", values[0])).collect();
            seeds.push([head.join("\n").as_bytes(), b"\n\n", &body].concat());
        }
        crate::fuzz::fuzz("a message", seeds, |bytes| {
            let message = message(bytes);
            let _ = position_of(&message);
            match read_any(&message) {
                Ok((_, Incoming::Event { event, previous })) => {
                    assert!(previous < event.position);
                    "an event".into()
                }
                Ok(_) => "a large one".into(),
                Err(reject) => format!("{reject:?}"),
            }
        });
    }
}
