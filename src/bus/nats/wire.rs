//! The wire format of messages, as `docs/wire-format.md` specifies it byte by byte.
//!
//! A change here needs a new number in `Storied-Wire`.

use std::fmt::Write;

use async_nats::header::{HeaderName, HeaderValue, NATS_MESSAGE_ID};
use async_nats::{HeaderMap, Message};
use bytes::{BufMut, Bytes, BytesMut};
use chrono::{DateTime, SecondsFormat, Utc};
use uuid::Uuid;

use super::subjects::{Mapping, Names};
use crate::bus::{BusError, ClaimedEvent};
use crate::codec::Codec;
use crate::event::{EventName, Position, RecordedEvent, StreamId, Version};

const WIRE: HeaderName = HeaderName::from_static("Storied-Wire");
const STORE: HeaderName = HeaderName::from_static("Storied-Store");
const POSITION: HeaderName = HeaderName::from_static("Storied-Position");
const PREVIOUS: HeaderName = HeaderName::from_static("Storied-Previous");
const STREAM: HeaderName = HeaderName::from_static("Storied-Stream");
const VERSION: HeaderName = HeaderName::from_static("Storied-Version");
const EVENT: HeaderName = HeaderName::from_static("Storied-Event");
const TIME: HeaderName = HeaderName::from_static("Storied-Time");
const COMMAND: HeaderName = HeaderName::from_static("Storied-Command");
const CORRELATION: HeaderName = HeaderName::from_static("Storied-Correlation");
const CODEC: HeaderName = HeaderName::from_static("Storied-Codec");
const BODY: HeaderName = HeaderName::from_static("Storied-Body");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Number of this format.
const FORMAT: &str = "1";

/// Value of `Storied-Body` if an event is too large for a message.
const OMITTED: &str = "omitted";

/// Upper bound of the headers and the frame of any message, in bytes.
const HEADROOM: usize = 4_096;

/// Maximum length of a `traceparent` header; the standard's has 55 bytes.
/// A longer one is in the metadata only.
const LONGEST_TRACEPARENT: usize = 256;

/// Maximum length of a `tracestate` header. The standard asks to forward up to this length.
const LONGEST_TRACESTATE: usize = 512;

/// CBOR: a map of two entries, and the keys with the tag of their value.
/// The tag is "encoded CBOR data item" (24) or "embedded JSON" (262).
const MAP: &[u8] = &[0xa2];
const PAYLOAD_CBOR: &[u8] = b"\x67payload\xd8\x18";
const PAYLOAD_JSON: &[u8] = b"\x67payload\xd9\x01\x06";
const METADATA: &[u8] = b"\x68metadata\xd8\x18";

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

/// A received message.
#[derive(Debug)]
pub(super) enum Incoming {
    Event {
        /// Position of the previous event in the log, whatever its name.
        previous: Position,
        event: RecordedEvent,
    },
    /// An event at this position that was too large for a message.
    Large(Position),
}

/// The reason why a message is not accepted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reject {
    /// The message is of the log of another store.
    OtherStore(String),
    /// The message does not have the format of storied.
    Malformed(String),
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

/// Decodes the message of an event of any store, and returns the id of the store.
pub(super) fn read_any(message: &Message) -> Result<(Uuid, Incoming), Reject> {
    let headers = in_format(message.headers.as_ref())?;
    Ok((Headers(headers).uuid(&STORE)?, read(message, headers)?))
}

/// The position in a message's headers, if there is one. Used to order messages.
pub(super) fn position_of(message: &Message) -> Option<u64> {
    message.headers.as_ref()?.get(POSITION)?.as_str().parse().ok()
}

/// Returns the headers if they are of this format.
fn in_format(headers: Option<&HeaderMap>) -> Result<&HeaderMap, Reject> {
    let headers = headers.ok_or_else(|| malformed("missing headers".into()))?;
    match headers.get(WIRE) {
        Some(format) if format.as_str() == FORMAT => Ok(headers),
        Some(format) => Err(malformed(format!("unknown wire format {:?}", format.as_str()))),
        None => Err(malformed("missing header Storied-Wire".into())),
    }
}

fn read(message: &Message, headers: &HeaderMap) -> Result<Incoming, Reject> {
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

fn malformed(what: String) -> Reject {
    Reject::Malformed(what)
}

struct Headers<'a>(&'a HeaderMap);

impl<'a> Headers<'a> {
    fn text(&self, name: &HeaderName) -> Result<&'a str, Reject> {
        let value = self.0.get(name.clone()).map(HeaderValue::as_str);
        value.ok_or_else(|| malformed(format!("missing header {name}")))
    }

    fn number(&self, name: &HeaderName) -> Result<u64, Reject> {
        self.text(name)?.parse().map_err(|error| malformed(format!("{name}: {error}")))
    }

    fn uuid(&self, name: &HeaderName) -> Result<Uuid, Reject> {
        Uuid::try_parse(self.text(name)?).map_err(|error| malformed(format!("{name}: {error}")))
    }

    /// The id of the event at `position`.
    /// The message id is `ID`, or `ID@POSITION` if the log has the id twice.
    fn event_id(&self, position: Position) -> Result<Uuid, Reject> {
        let text = self.text(&NATS_MESSAGE_ID)?;
        let id = match text.split_once('@') {
            Some((id, at)) if at.parse() == Ok(position.get()) => id,
            Some(_) => return Err(malformed(format!("{NATS_MESSAGE_ID}: not of position {position}"))),
            None => text,
        };
        Uuid::try_parse(id).map_err(|error| malformed(format!("{NATS_MESSAGE_ID}: {error}")))
    }
}

/// Encodes `category/id`.
/// A byte that a header cannot carry or would not preserve becomes `%` and two hexadecimal digits.
fn stream_header(stream: &StreamId) -> String {
    let mut text = String::with_capacity(stream.category().len() + 1 + stream.id().len());
    text.push_str(stream.category());
    text.push('/');
    for byte in stream.id().bytes() {
        if matches!(byte, b'!'..=b'~') && byte != b'%' {
            text.push(char::from(byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

fn read_stream(header: &str) -> Option<StreamId> {
    let (category, id) = header.split_once('/')?;
    StreamId::new(category, percent_decoded(id)?).ok()
}

/// Decodes `%` and two hexadecimal digits to a byte.
pub(super) fn percent_decoded(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        if byte == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &rest[2..];
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

fn payload_key(codec: Codec) -> &'static [u8] {
    match codec {
        Codec::Cbor => PAYLOAD_CBOR,
        Codec::Json => PAYLOAD_JSON,
    }
}

fn body(event: &RecordedEvent) -> Bytes {
    let mut body = BytesMut::with_capacity(event.payload.len() + event.metadata.len() + 48);
    body.put_slice(MAP);
    for (key, value) in [(payload_key(event.codec), &event.payload), (METADATA, &event.metadata)] {
        body.put_slice(key);
        put_byte_string(&mut body, value);
    }
    body.freeze()
}

/// Reads payload and metadata, which share the body's memory.
fn read_body(body: &Bytes, codec: Codec) -> Option<(Bytes, Bytes)> {
    let mut rest = body.clone();
    take(&mut rest, MAP)?;
    take(&mut rest, payload_key(codec))?;
    let payload = take_byte_string(&mut rest)?;
    take(&mut rest, METADATA)?;
    let metadata = take_byte_string(&mut rest)?;
    rest.is_empty().then_some((payload, metadata))
}

/// Writes a byte string as in RFC 8949, with the shortest length encoding.
fn put_byte_string(body: &mut BytesMut, value: &[u8]) {
    const BYTE_STRING: u8 = 0x40;
    match value.len() {
        length @ 0..24 => body.put_u8(BYTE_STRING | length as u8),
        length @ 24..0x100 => body.put_slice(&[BYTE_STRING | 24, length as u8]),
        length @ 0x100..0x1_0000 => {
            body.put_u8(BYTE_STRING | 25);
            body.put_u16(length as u16);
        }
        length @ 0x1_0000..0x1_0000_0000 => {
            body.put_u8(BYTE_STRING | 26);
            body.put_u32(length as u32);
        }
        length => {
            body.put_u8(BYTE_STRING | 27);
            body.put_u64(length as u64);
        }
    }
    body.put_slice(value);
}

fn take_byte_string(rest: &mut Bytes) -> Option<Bytes> {
    let first = *rest.first()?;
    let (short, extra) = match first.checked_sub(0x40)? {
        length @ 0..24 => (Some(length), 0),
        size @ 24..28 => (None, 1_usize << (size - 24)),
        _ => return None,
    };
    let digits = rest.get(1..1 + extra)?;
    let length = match short {
        Some(length) => usize::from(length),
        None => {
            let length = digits.iter().fold(0, |length, digit| length << 8 | u64::from(*digit));
            usize::try_from(length).ok()?
        }
    };
    let start = 1 + extra;
    let end = start.checked_add(length).filter(|end| *end <= rest.len())?;
    let value = rest.slice(start..end);
    *rest = rest.slice(end..);
    Some(value)
}

fn take(rest: &mut Bytes, expected: &[u8]) -> Option<()> {
    if !rest.starts_with(expected) {
        return None;
    }
    *rest = rest.slice(expected.len()..);
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bus::nats::subjects::Subjects;
    use crate::event::Metadata;

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
