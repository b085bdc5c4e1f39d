//! The wire format as a foreign subscriber sees it. `docs/wire-format.md` describes the same.

use std::collections::BTreeMap;
use std::fmt::Write;

use bytes::Bytes;
use chrono::{DateTime, TimeZone, Utc};
use futures_util::StreamExt;
use storied::bus::{LogBatch, LogStreamEnd};
use storied::{Codec, EventBus, EventName, Metadata, Position, RecordedEvent, StreamId, Version};
use tokio::time::timeout;
use uuid::Uuid;

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer};

fn event(position: u64, name: &str, id: &str, codec: Codec, payload: &[u8]) -> RecordedEvent {
    RecordedEvent {
        id: Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + u128::from(position)),
        stream: StreamId::new("shop.order", id).unwrap(),
        version: Version::new(position / 10),
        position: Position::new(position),
        name: EventName::new(name).unwrap(),
        codec,
        payload: Bytes::copy_from_slice(payload),
        command_id: Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_c000),
        metadata: Metadata::default().encode().unwrap(),
        recorded_at: Utc.timestamp_opt(1_767_323_045, 123_456_789).unwrap(),
    }
}

fn log() -> Vec<RecordedEvent> {
    let mut full = Metadata::default();
    full.correlation_id = Some(Uuid::from_u128(7));
    full.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
    full.user = BTreeMap::from([("tenant".into(), "acme".into())]);
    let mut with_metadata = event(12, "shop.order.paid", "17", Codec::Cbor, &[0x19, 0x04, 0xd2]);
    with_metadata.metadata = full.encode().unwrap();
    vec![
        event(10, "shop.order.placed", "17", Codec::Cbor, b"\xa1\x68customer\x63Ada"),
        with_metadata,
        event(20, "shop.order.noted", "a b/ß%", Codec::Json, br#"{"text":"gift"}"#),
        event(
            30,
            "shop.order.placed",
            "18",
            Codec::Cbor,
            &[b"\x59\x20\x00".as_slice(), &[0; 8_192]].concat(),
        ),
    ]
}

/// Formats a message except for the order of its headers, which has no meaning.
fn show(message: &async_nats::Message) -> String {
    let mut text = format!("{}\n", message.subject);
    let headers = message.headers.as_ref().unwrap().iter();
    let headers: BTreeMap<String, &str> =
        headers.map(|(name, values)| (name.to_string(), values[0].as_str())).collect();
    for (name, value) in headers {
        writeln!(text, "  {name}: {value}").unwrap();
    }
    let body: String = message.payload.iter().map(|byte| format!("{byte:02x}")).collect();
    writeln!(text, "  {}", if body.is_empty() { "(no body)" } else { &body }).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_match_the_golden_files() {
    let store = Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_5000);
    for kind in NATS {
        let config = vec!["max_payload: 8192".into()];
        let options_of = support::NatsOptions { config, ..support::NatsOptions::jetstream() };
        let server = NatsServer::start(options_of).await;
        let raw = async_nats::connect(server.url()).await.unwrap();
        let mut seen = raw.subscribe("shop.>").await.unwrap();
        raw.flush().await.unwrap();

        let bus = options(kind, &server).namespace("shop").bus();
        let mut publisher = bus.publisher(store).await.unwrap();
        publisher.resume(LogStreamEnd::default()).await.unwrap();
        let events = log().into();
        let batch = LogBatch { after: Position::new(7), upto: Position::new(30), events };
        publisher.publish(batch).await.unwrap();
        publisher.heartbeat(Position::new(30)).await.unwrap();

        let mut found = String::new();
        for _ in 0..5 {
            found += &show(&timeout(PATIENCE, seen.next()).await.unwrap().unwrap());
        }
        // The log stream adds the expected previous sequence, and the previous id while it is in
        // flight. Nothing else differs.
        let expected: String =
            found.lines().filter(|line| line.contains("Nats-Expected-Last-Sequence")).collect();
        let numbers = if kind == Kind::JetStream { "0123" } else { "" };
        let digits: String = expected.chars().filter(char::is_ascii_digit).collect();
        assert_eq!(digits, numbers);
        let ids = found.lines().filter(|line| line.contains("Nats-Expected-Last-Msg-Id")).count();
        assert_eq!(ids, if kind == Kind::JetStream { 3 } else { 0 });
        let rest = found.lines().filter(|line| !line.contains("Nats-Expected-Last-"));
        let rest: String = rest.flat_map(|line| [line, "\n"]).collect();
        assert_eq!(rest, include_str!("../../golden/wire.txt"), "{kind:?}:\n{rest}");

        // The message in the log stream is the same.
        if kind == Kind::JetStream {
            let context = async_nats::jetstream::new(raw);
            let stream = context.get_stream("SHOP_EVENTS").await.unwrap();
            let first = stream.get_raw_message(1).await.unwrap();
            assert_eq!(first.headers.get("Storied-Position").unwrap().as_str(), "10");
        }
    }
}

/// Decodes an envelope as any language can: with a CBOR reader and without storied.
#[test]
fn the_body_is_plain_cbor() {
    use storied::ciborium::Value;
    let golden = include_str!("../../golden/wire.txt");
    let bodies: Vec<Vec<u8>> = golden
        .lines()
        .filter_map(|line| line.strip_prefix("  a2"))
        .map(|hex| format!("a2{hex}"))
        .map(|hex| {
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
        })
        .collect();
    assert_eq!(bodies.len(), 3);
    let entry = |body: &[u8], key: &str| {
        let Value::Map(entries) = storied::ciborium::from_reader(body).unwrap() else { panic!("no map") };
        let entry = entries.into_iter().find(|(name, _)| name.as_text() == Some(key)).unwrap();
        let Value::Tag(tag, value) = entry.1 else { panic!("no tag") };
        (tag, value.into_bytes().unwrap())
    };
    let (tag, payload) = entry(&bodies[0], "payload");
    let payload: Value = storied::ciborium::from_reader(&payload[..]).unwrap();
    assert_eq!((tag, payload.as_map().unwrap()[0].1.as_text()), (24, Some("Ada")));
    let (tag, payload) = entry(&bodies[2], "payload");
    assert_eq!((tag, &payload[..]), (262, &br#"{"text":"gift"}"#[..]));
    let (tag, metadata) = entry(&bodies[1], "metadata");
    let metadata: BTreeMap<String, Value> = storied::ciborium::from_reader(&metadata[..]).unwrap();
    assert_eq!((tag, metadata["user"].as_map().unwrap()[0].1.as_text()), (24, Some("acme")));
    let time: DateTime<Utc> = "2026-01-02T03:04:05.123456789Z".parse().unwrap();
    assert_eq!(time, log()[0].recorded_at);
}
