//! The stored bytes of names, payloads and metadata, and their reading after changes of the types.

mod shapes;

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::DateTime;
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use storied::ciborium::Value;
use storied::event::DecodeErrorKind;
use storied::store::FilterError;
use storied::{
    Codec, EncodeError, Event, EventName, Filter, Metadata, NewEvent, Position, RecordedEvent, StreamId,
    Upcasters, Version,
};
use uuid::Uuid;

/// Has one variant of every form of serde.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OrderEvent {
    Placed {
        customer: String,
        lines: Vec<(String, u32)>,
        note: Option<String>,
    },
    Paid(i64),
    Weighed(f64, bool),
    Noted(Option<String>),
    #[serde(alias = "shipped", alias = "sent")]
    Dispatched,
}

impl Event for OrderEvent {
    const CATEGORY: &'static str = "shop.order";
}

fn recorded(category: &str, new: NewEvent, codec: Codec) -> RecordedEvent {
    RecordedEvent {
        id: new.id,
        stream: StreamId::new(category, "17").unwrap(),
        version: Version::new(3),
        position: Position::new(9),
        name: new.name,
        codec,
        payload: new.payload,
        command_id: new.command_id,
        metadata: new.metadata,
        recorded_at: DateTime::UNIX_EPOCH,
    }
}

fn encode<E: Event>(event: &E, codec: Codec) -> RecordedEvent {
    recorded(E::CATEGORY, NewEvent::encode(event, codec, &Metadata::default()).unwrap(), codec)
}

/// Returns an event as another program or an older version stored it.
fn stored(category: &str, name: &str, payload: &[u8]) -> RecordedEvent {
    let mut event = encode(&OrderEvent::Dispatched, Codec::Cbor);
    event.stream = StreamId::new(category, "17").unwrap();
    event.name = EventName::new(name).unwrap();
    event.payload = Bytes::copy_from_slice(payload);
    event
}

fn cbor<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    storied::ciborium::into_writer(value, &mut bytes).unwrap();
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The stored form of every kind of variant.
///
/// Existing stores have these bytes: a change needs a migration.
#[test]
fn payload_bytes_are_frozen() {
    let events = [
        OrderEvent::Placed { customer: "Ada".into(), lines: vec![("pen".into(), 2)], note: None },
        OrderEvent::Paid(-1_234),
        OrderEvent::Weighed(1.5, true),
        OrderEvent::Noted(None),
        OrderEvent::Noted(Some("gift".into())),
        OrderEvent::Dispatched,
    ];
    let mut found = String::new();
    for event in &events {
        for codec in [Codec::Cbor, Codec::Json] {
            let event = encode(event, codec);
            let payload = match codec {
                Codec::Json => String::from_utf8(event.payload.to_vec()).unwrap(),
                _ => hex(&event.payload),
            };
            found += &format!("{} {codec} {payload}\n", event.name);
        }
    }
    assert_eq!(found, include_str!("../golden/payloads.txt"));
}

#[test]
fn metadata_bytes_are_frozen() {
    let mut full = Metadata::default();
    full.correlation_id = Some(Uuid::from_u128(7));
    full.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
    full.tracestate = Some("vendor=1".into());
    full.user = BTreeMap::from([("tenant".into(), "acme".into()), ("user".into(), "ada".into())]);
    let found =
        format!("{}\n{}\n", hex(&Metadata::default().encode().unwrap()), hex(&full.encode().unwrap()));
    assert_eq!(found, include_str!("../golden/metadata.txt"));
    let mut event = encode(&OrderEvent::Dispatched, Codec::Cbor);
    event.metadata = full.encode().unwrap();
    assert_eq!(event.decode_metadata().unwrap(), full);
    // Written by a later version with more fields.
    event.metadata = cbor(&BTreeMap::from([("later", "x"), ("traceparent", "t")])).into();
    assert_eq!(event.decode_metadata().unwrap().traceparent.as_deref(), Some("t"));
    event.metadata = Bytes::from_static(b"\xff");
    let error = event.decode_metadata().unwrap_err();
    assert!(matches!(error.kind, DecodeErrorKind::Metadata(_)), "{error}");
}

/// F54: every event of a command carries the metadata.
#[test]
fn metadata_has_a_limit() {
    let of = |size: usize| {
        let mut metadata = Metadata::default();
        metadata.traceparent = Some("00".into());
        metadata.user = BTreeMap::from([("tenant".into(), "acme".into()), ("note".into(), "x".repeat(size))]);
        metadata
    };
    let overhead = of(60_000).encode().unwrap().len() - 60_000;
    let largest = Metadata::MAX_BYTES - overhead;
    assert_eq!(of(largest).encode().unwrap().len(), Metadata::MAX_BYTES);
    let error = of(largest + 1).encode().unwrap_err();
    assert!(
        matches!(&error, EncodeError::MetadataTooLarge { bytes, limit, largest }
            if (*bytes, *limit) == (65_537, 65_536) && largest == "entry \"note\""),
        "{error}"
    );
    assert!(NewEvent::encode(&OrderEvent::Dispatched, Codec::Cbor, &of(largest + 1)).is_err());
    let mut traced = Metadata::default();
    traced.tracestate = Some("x".repeat(70_000));
    assert!(traced.encode().unwrap_err().to_string().contains("tracestate is the largest part"));
}

/// F29: decoders and encoders of CBOR report in Rust's `Debug` form by themselves.
#[test]
fn errors_are_in_words() {
    let payloads: [(&str, &[u8]); 10] = [
        ("paid", &[0x1b, 1]),
        ("paid", &[0x1c]),
        ("weighed", &[0x82, 0x1c, 0xf5]),
        ("weighed", &[0x82, 0x61, 0x61, 0xf5]),
        ("paid", &[0x61, 0x61]),
        ("placed", &[0xa0]),
        ("placed", &[0x81; 1000]),
        ("paid", &[0xff]),
        ("noted", &[0x62, 0xc3, 0x28]),
        ("dispatched", &[0xf6, 0x00]),
    ];
    let says = payloads.map(|(name, payload)| {
        let event = stored("shop.order", &format!("shop.order.{name}"), payload);
        let error = event.decode::<OrderEvent>().unwrap_err().to_string();
        error.rsplit_once("does not decode: ").unwrap().1.to_owned()
    });
    assert_eq!(
        says,
        [
            "unexpected end of the CBOR data",
            "malformed CBOR, 1 bytes before the end",
            "malformed CBOR, 2 bytes before the end",
            "invalid type: string, expected float",
            "invalid type: string, expected integer",
            "missing field `customer`",
            "invalid type: sequence, expected string",
            "invalid type: break, expected integer",
            "malformed CBOR, 3 bytes before the end",
            "2 trailing bytes",
        ]
    );
    let deep = Codec::Cbor.decode_value(&[0x81; 1000]).unwrap_err();
    assert_eq!(deep, "the CBOR data is nested too deeply");

    #[derive(Serialize, Deserialize)]
    enum Odd {
        Failing(#[serde(serialize_with = "refuse")] u8),
    }
    fn refuse<S: serde::Serializer>(_: &u8, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("it is secret"))
    }
    impl Event for Odd {
        const CATEGORY: &'static str = "odd";
    }
    for codec in [Codec::Cbor, Codec::Json] {
        let error = NewEvent::encode(&Odd::Failing(1), codec, &Metadata::default()).unwrap_err().to_string();
        assert!(error.ends_with("failed: it is secret"), "{error}");
    }
}

/// F7: every shape is read as written, read as the list says, or refused.
///
/// The list is in `tests/fast/codec/shapes.rs`.
#[test]
fn every_shape_is_read_or_refused() {
    let (mut checked, mut wrong) = (0, Vec::new());
    shapes::check(|name, codec, result| {
        checked += 1;
        wrong.extend(result.err().map(|error| format!("{name} in {codec}: {error}")));
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(checked >= 2 * 60, "{checked} shapes and codecs");
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Tree {
    Leaf,
    Newtype(Box<Tree>),
    List(Vec<Tree>, u8),
    Struct { next: Option<Box<Tree>> },
}

impl Event for Tree {
    const CATEGORY: &'static str = "tree";
}

/// F7: both codecs refuse the same depth, and every written value can be read.
#[test]
fn nesting_has_one_limit() {
    let grow: [fn(Tree) -> Tree; 3] = [
        |tree| Tree::Newtype(Box::new(tree)),
        |tree| Tree::List(vec![tree], 1),
        |tree| Tree::Struct { next: Some(Box::new(tree)) },
    ];
    for grow in grow {
        let (mut tree, mut stored, mut refused) = (Tree::Leaf, 0, 0);
        for _ in 0..150 {
            let [cbor, json] = [Codec::Cbor, Codec::Json]
                .map(|codec| NewEvent::encode(&tree, codec, &Metadata::default()).map(|new| (new, codec)));
            assert_eq!(cbor.is_ok(), json.is_ok(), "{cbor:?} {json:?}");
            refused += usize::from(cbor.is_err());
            for (new, codec) in [cbor, json].into_iter().flatten() {
                assert_eq!(recorded("tree", new, codec).decode::<Tree>().unwrap(), tree);
                stored += 1;
            }
            tree = grow(tree);
        }
        assert!(stored > 60 && refused > 20, "{stored} stored, {refused} refused");
    }
}

/// Checks that foreign bytes of any depth end neither the process nor the stack.
#[test]
fn bytes_of_any_depth_are_refused() {
    let cbor: [&[u8]; 9] = [
        b"\x81",
        b"\x9f",
        b"\xa1\x61a",
        b"\xbf\x61a",
        b"\xc1",
        b"\xa1\x67Newtype",
        b"\xa1\x64List\x82\x81",
        b"\xa1\x66Struct\xa1\x64next",
        b"\xa1\x66Struct\xa1\x65other\x81",
    ];
    let json: [&[u8]; 4] = [b"[", b"{\"a\":", b"{\"Newtype\":", b"{\"Struct\":{\"next\":"];
    let inputs = cbor.map(|unit| (Codec::Cbor, unit)).into_iter().chain(json.map(|unit| (Codec::Json, unit)));
    for (codec, unit) in inputs {
        for times in [100, 130, 250, 300, 100_000] {
            let bytes = unit.repeat(times);
            assert!(codec.decode_value(&bytes).is_err(), "{codec} {unit:?} {times}");
            for name in ["tree.Newtype", "tree.List", "tree.Struct"] {
                let event = stored("tree", name, &bytes);
                assert!(RecordedEvent { codec, ..event }.decode::<Tree>().is_err());
            }
            let metadata = RecordedEvent { metadata: bytes.into(), ..stored("tree", "tree.Leaf", &[0xf6]) };
            assert!(metadata.decode_metadata().is_err());
        }
    }
}

#[test]
fn serde_names_the_events() {
    let names: Vec<_> = [OrderEvent::Paid(1), OrderEvent::Dispatched]
        .iter()
        .map(|event| encode(event, Codec::Cbor).name.to_string())
        .collect();
    assert_eq!(names, ["shop.order.paid", "shop.order.dispatched"]);
}

#[test]
fn an_alias_reads_and_finds_what_is_stored_under_the_old_name() {
    for old in ["shop.order.shipped", "shop.order.sent", "shop.order.dispatched"] {
        assert_eq!(
            stored("shop.order", old, &[0xf6]).decode::<OrderEvent>().unwrap(),
            OrderEvent::Dispatched
        );
    }
    let filter = Filter::variants::<OrderEvent>(["dispatched"]);
    let names: Vec<_> = filter.names().unwrap().iter().map(EventName::as_str).collect();
    assert_eq!(names, ["shop.order.dispatched", "shop.order.sent", "shop.order.shipped"]);
    let paid = Filter::variants::<OrderEvent>(["paid"]);
    assert_eq!(paid.names().unwrap().len(), 1);
    let error = Filter::variants::<OrderEvent>(["payed"]).check().unwrap_err();
    assert!(matches!(&error, FilterError::UnknownVariant { variant, .. } if variant == "payed"), "{error:?}");
}

#[test]
fn decode_errors_name_the_event_and_the_cause() {
    let unknown = stored("shop.order", "shop.order.refunded", &[0xf6]).decode::<OrderEvent>().unwrap_err();
    assert_eq!(unknown.kind, DecodeErrorKind::UnknownName);
    let text = unknown.to_string();
    for part in ["shop.order.refunded", "version 3", "shop.order/17"] {
        assert!(text.contains(part), "{text}");
    }
    let shape = stored("shop.order", "shop.order.paid", &cbor(&"much")).decode::<OrderEvent>().unwrap_err();
    assert!(matches!(shape.kind, DecodeErrorKind::Payload(_)), "{shape}");
    let broken = stored("shop.order", "shop.order.paid", &[0x1b, 1]).decode::<OrderEvent>().unwrap_err();
    assert!(matches!(broken.kind, DecodeErrorKind::Payload(_)), "{broken}");
    let other = stored("stock", "stock.moved", &[0xf6]);
    assert!(matches!(other.decode::<OrderEvent>().unwrap_err().kind, DecodeErrorKind::OtherCategory { .. }));
    assert_eq!(other.decode_if::<OrderEvent>().unwrap(), None);
    // A category that only begins like this one is another category.
    let longer = stored("shop.orders", "shop.orders.paid", &cbor(&1));
    assert_eq!(longer.decode_if::<OrderEvent>().unwrap(), None);
}

/// The current type, and payloads of three older versions of the program.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LedgerEvent {
    Booked {
        pence: i64,
        #[serde(default)]
        reference: String,
    },
}

impl Event for LedgerEvent {
    const CATEGORY: &'static str = "ledger";

    fn upcasters() -> Upcasters {
        Upcasters::new()
            .rename("entered", "posted")
            .upcast("posted", "booked", |payload| {
                let pounds = payload.as_integer().and_then(|n| i64::try_from(n).ok());
                let pence = pounds.and_then(|pounds| pounds.checked_mul(100)).ok_or("no amount")?;
                Ok(Value::Map(vec![("pence".into(), pence.into())]))
            })
            .rename("lost", "nowhere")
    }
}

#[test]
fn upcasters_are_chained_and_old_names_are_found() {
    let booked = |pence| LedgerEvent::Booked { pence, reference: String::new() };
    for (name, payload, event) in [
        ("ledger.entered", cbor(&3), booked(300)),
        ("ledger.posted", cbor(&4), booked(400)),
        ("ledger.booked", cbor(&BTreeMap::from([("pence", 5)])), booked(5)),
    ] {
        assert_eq!(stored("ledger", name, &payload).decode::<LedgerEvent>().unwrap(), event);
    }
    let json = RecordedEvent {
        codec: Codec::Json,
        payload: Bytes::from_static(b"6"),
        ..stored("ledger", "ledger.posted", &[])
    };
    assert_eq!(json.decode::<LedgerEvent>().unwrap(), booked(600));
    let filter = Filter::variants::<LedgerEvent>(["booked"]);
    let names: Vec<_> = filter.names().unwrap().iter().map(EventName::as_str).collect();
    assert_eq!(names, ["ledger.booked", "ledger.entered", "ledger.posted"]);

    let refused = stored("ledger", "ledger.posted", &cbor(&"x")).decode::<LedgerEvent>().unwrap_err();
    assert_eq!(refused.kind, DecodeErrorKind::Upcast("no amount".into()));
    let error = stored("ledger", "ledger.lost", &[0xf6]).decode::<LedgerEvent>().unwrap_err();
    assert_eq!(error.kind, DecodeErrorKind::UnknownName);
}

/// F10: a rule for a current name would change new events, which the live state folds as written.
#[test]
fn upcasters_that_change_new_events_are_refused() {
    macro_rules! refused {
        ($rules:expr, $what:literal) => {{
            #[derive(Debug, Serialize, Deserialize)]
            #[serde(rename_all = "snake_case")]
            enum PaymentEvent {
                #[serde(alias = "settled")]
                Paid(i64),
                Refunded(i64),
            }
            impl Event for PaymentEvent {
                const CATEGORY: &'static str = "payment";
                fn upcasters() -> Upcasters {
                    $rules
                }
            }
            let error = Filter::of::<PaymentEvent>().check().unwrap_err();
            let FilterError::Events(EncodeError::Upcasters { category: "payment", .. }) = &error else {
                panic!("{error:?}");
            };
            assert!(error.to_string().contains($what), "{error}");
            let encoded = NewEvent::encode(&PaymentEvent::Paid(1), Codec::Cbor, &Metadata::default());
            assert!(matches!(encoded, Err(EncodeError::Upcasters { .. })), "{encoded:?}");
        }};
    }
    refused!(Upcasters::new().upcast("paid", "paid", Ok), "the enum still reads \"paid\"");
    refused!(Upcasters::new().upcast("paid", "refunded", Ok), "the enum still reads \"paid\"");
    refused!(Upcasters::new().upcast("settled", "paid", Ok), "remove its alias");
    refused!(Upcasters::new().rename("old", "older").rename("older", "old"), "form a cycle");
    refused!(Upcasters::new().rename("old", "old"), "form a cycle");
    refused!(Upcasters::new().rename("old", "paid").rename("old", "refunded"), "two rules for \"old\"");
}

/// F30: a variant may gain its first fields or lose its last; nothing else may become empty.
#[test]
fn a_variant_gains_its_first_fields_and_loses_its_last() {
    mod before {
        use super::*;
        #[derive(Debug, Serialize, Deserialize)]
        pub(super) enum DoorEvent {
            Closed,
            Locked {},
            Keyed(Option<u8>),
            Named(Name),
        }
        #[derive(Debug, Serialize, Deserialize)]
        pub(super) struct Name {
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub(super) name: Option<u8>,
        }
        impl Event for DoorEvent {
            const CATEGORY: &'static str = "door";
        }
    }
    mod after {
        use super::*;
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        pub(super) enum DoorEvent {
            Closed {
                #[serde(default)]
                by: String,
            },
            Locked,
            Keyed {
                key: u8,
            },
            Named(Option<Name>),
        }
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        pub(super) struct Name {
            pub(super) name: u8,
        }
        impl Event for DoorEvent {
            const CATEGORY: &'static str = "door";
        }
    }
    use before::DoorEvent as Before;
    for codec in [Codec::Cbor, Codec::Json] {
        let read = |event: &Before| encode(event, codec).decode::<after::DoorEvent>();
        assert_eq!(read(&Before::Closed).unwrap(), after::DoorEvent::Closed { by: String::new() }, "{codec}");
        assert_eq!(read(&Before::Locked {}).unwrap(), after::DoorEvent::Locked, "{codec}");
        // A missing field stays an error, and is never read as nothing.
        assert!(read(&Before::Keyed(None)).is_err(), "{codec}");
        assert!(read(&Before::Named(before::Name { name: None })).is_err(), "{codec}");
        let back = |event: &after::DoorEvent| encode(event, codec).decode::<Before>();
        assert!(matches!(back(&after::DoorEvent::Locked).unwrap(), Before::Locked {}), "{codec}");
        let by = String::from("x");
        assert!(back(&after::DoorEvent::Closed { by }).is_err(), "{codec}: content is not dropped");
    }
}

/// F31.
#[test]
fn a_serde_other_variant_is_refused() {
    #[derive(Debug, Serialize, Deserialize)]
    enum ThingEvent {
        Known,
        #[serde(other)]
        Unknown,
    }
    impl Event for ThingEvent {
        const CATEGORY: &'static str = "thing";
    }
    let error = Filter::of::<ThingEvent>().check().unwrap_err().to_string();
    assert!(error.contains("serde(other)") && error.contains("UnknownNames"), "{error}");
    for event in [ThingEvent::Known, ThingEvent::Unknown] {
        NewEvent::encode(&event, Codec::Cbor, &Metadata::default()).unwrap_err();
    }
}

/// F7: a value that serde writes and does not read is refused, with the event and the field.
#[test]
fn values_that_do_not_round_trip_are_refused_with_their_field() {
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum ReadingEvent {
        Taken {
            sensor: Sensor,
        },
        Tagged {
            id: u8,
            #[serde(flatten)]
            tags: BTreeMap<String, String>,
        },
        Large {
            #[serde(flatten)]
            amount: Amount,
        },
        Left {
            #[serde(skip_serializing_if = "Option::is_none")]
            note: Option<String>,
            #[serde(skip_serializing_if = "Vec::is_empty")]
            list: Vec<u8>,
        },
        From {
            #[serde(flatten)]
            source: Source,
        },
        Deep(serde_json::Value),
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct Sensor {
        values: Vec<f64>,
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct Amount {
        exact: u128,
    }
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(tag = "kind")]
    enum Source {
        Net { ip: std::net::IpAddr },
    }
    impl Event for ReadingEvent {
        const CATEGORY: &'static str = "reading";
    }
    let deep = |depth: usize| {
        (0..depth).fold(serde_json::Value::Null, |inner, _| serde_json::Value::Array(vec![inner]))
    };
    let tags = |key: &str| BTreeMap::from([(key.to_owned(), "7".to_owned())]);
    let refused = |event: ReadingEvent, codec: Codec, field: &str| match NewEvent::encode(
        &event,
        codec,
        &Metadata::default(),
    )
    .unwrap_err()
    {
        EncodeError::NotReadable { what, field: found, .. } => {
            assert!(what.starts_with("reading."), "{what}");
            assert_eq!(found, field, "{codec} {event:?}");
        }
        other => panic!("{codec} {event:?}: {other}"),
    };
    for codec in [Codec::Cbor, Codec::Json] {
        // The value decides.
        encode(&ReadingEvent::Tagged { id: 1, tags: tags("colour") }, codec)
            .decode::<ReadingEvent>()
            .unwrap();
        refused(ReadingEvent::Tagged { id: 1, tags: tags("id") }, codec, "its content");
        refused(ReadingEvent::Left { note: None, list: vec![] }, codec, "its content");
        encode(&ReadingEvent::Deep(deep(50)), codec).decode::<ReadingEvent>().unwrap();
        let encoded = NewEvent::encode(&ReadingEvent::Deep(deep(300)), codec, &Metadata::default());
        let error = encoded.unwrap_err();
        assert!(
            matches!(error, EncodeError::Serialize { .. }) && error.to_string().contains("limit 127"),
            "{error}"
        );
    }
    refused(
        ReadingEvent::Taken { sensor: Sensor { values: vec![1.0, f64::NAN] } },
        Codec::Json,
        "sensor.values[1]",
    );
    encode(&ReadingEvent::Taken { sensor: Sensor { values: vec![f64::NAN] } }, Codec::Cbor)
        .decode::<ReadingEvent>()
        .unwrap();
    let large = NewEvent::encode(
        &ReadingEvent::Large { amount: Amount { exact: u128::MAX } },
        Codec::Cbor,
        &Metadata::default(),
    );
    large.unwrap_err();
    let net = ReadingEvent::From { source: Source::Net { ip: [127, 0, 0, 1].into() } };
    refused(net, Codec::Cbor, "its content");
}

#[test]
fn types_that_are_no_event_enum_are_refused() {
    macro_rules! refused {
        ($type:ty) => {{
            impl Event for $type {
                const CATEGORY: &'static str = "odd";
            }
            let error = Filter::of::<$type>().check().unwrap_err().to_string();
            assert!(error.contains("externally tagged"), "{error}");
        }};
    }
    #[derive(Serialize, Deserialize)]
    #[serde(tag = "type")]
    enum Internally {
        A {},
    }
    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Untagged {
        A(u32),
    }
    #[derive(Serialize, Deserialize)]
    struct Struct {
        a: u32,
    }
    refused!(Internally);
    refused!(Untagged);
    refused!(Struct);
    let _ = (Internally::A {}, Untagged::A(1), Struct { a: 1 });

    #[derive(Serialize, Deserialize)]
    enum Spaced {
        #[serde(rename = "was placed")]
        A,
    }
    impl Event for Spaced {
        const CATEGORY: &'static str = "odd";
    }
    let error = Filter::of::<Spaced>().check().unwrap_err().to_string();
    assert!(error.contains("odd.was placed"), "{error}");
    let _ = Spaced::A;
}

#[test]
fn names_and_ids_are_checked() {
    for bad in ["", ".", "a.", ".a", "a..b", "a b", "a>", "*", "ä", "a\0", &"x".repeat(201)] {
        assert!(EventName::new(bad).is_err(), "{bad:?}");
    }
    for good in ["a", "shop.order-line.added_v2", &"x".repeat(200)] {
        assert!(EventName::new(good).is_ok(), "{good:?}");
    }
    for bad in ["", "a\nb", "\0", &"x".repeat(401)] {
        assert!(StreamId::new("order", bad).is_err(), "{bad:?}");
    }
    for good in ["17", "O'Brien \"x\" 🦀", &"x".repeat(400)] {
        assert!(StreamId::new("order", good).is_ok(), "{good:?}");
    }
}

fn events() -> impl Strategy<Value = OrderEvent> {
    let text = "\\PC{0,40}";
    prop_oneof![
        (text, prop::collection::vec((text, any::<u32>()), 0..40), prop::option::of(text))
            .prop_map(|(customer, lines, note)| OrderEvent::Placed { customer, lines, note }),
        any::<i64>().prop_map(OrderEvent::Paid),
        (prop::num::f64::NORMAL, any::<bool>()).prop_map(|(weight, net)| OrderEvent::Weighed(weight, net)),
        prop::option::of(text).prop_map(OrderEvent::Noted),
        Just(OrderEvent::Dispatched),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_event_comes_back(event in events()) {
        for codec in [Codec::Cbor, Codec::Json] {
            let recorded = encode(&event, codec);
            prop_assert_eq!(&recorded.decode::<OrderEvent>().unwrap(), &event);
        }
        // Tools read the payload without the type.
        let recorded = encode(&event, Codec::Cbor);
        let _: Value = storied::ciborium::from_reader(&recorded.payload[..]).unwrap();
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), variant in 0..5_usize) {
        let name = ["placed", "paid", "weighed", "noted", "dispatched"][variant];
        let event = stored("shop.order", &format!("shop.order.{name}"), &bytes);
        let _ = event.decode::<OrderEvent>();
        let _ = RecordedEvent { codec: Codec::Json, ..event.clone() }.decode::<OrderEvent>();
        let _ = stored("ledger", "ledger.posted", &bytes).decode::<LedgerEvent>();
        let _ = RecordedEvent { metadata: bytes.into(), ..event }.decode_metadata();
    }

    #[test]
    fn a_filter_is_the_and_of_its_conditions(category in 0..2_usize, name in 0..3_usize, wanted in 0..8_u8) {
        let categories = ["shop.order", "ledger"];
        let names = ["x.a", "x.b", "x.c"];
        let event = stored(categories[category], names[name], &[0xf6]);
        let wants = |bit: u8| wanted & (1 << bit) != 0;
        let mut filter = Filter::all();
        if wants(0) { filter = filter.with_names([EventName::new("x.a").unwrap(), EventName::new("x.b").unwrap()]); }
        if wants(1) { filter = filter.category("ledger"); }
        if wants(2) { filter = filter.with_streams([]); }
        let expected = (!wants(0) || name < 2) && (!wants(1) || category == 1) && !wants(2);
        prop_assert_eq!(filter.matches(&event), expected);
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BillEvent {
    Settled { by: Uuid },
}

impl Event for BillEvent {
    const CATEGORY: &'static str = "bill";

    fn upcasters() -> Upcasters {
        Upcasters::new().rename("paid", "settled")
    }
}

/// A UUID is text in JSON and bytes in CBOR: an upcast payload stays in the codec of the store.
#[test]
fn upcasting_keeps_the_codec() {
    let by = Uuid::from_u128(5);
    for codec in [Codec::Cbor, Codec::Json] {
        let mut event = encode(&BillEvent::Settled { by }, codec);
        event.name = EventName::new("bill.paid").unwrap();
        assert_eq!(event.decode::<BillEvent>().unwrap(), BillEvent::Settled { by }, "{codec}");
    }
}

#[test]
fn trailing_bytes_are_refused() {
    for (name, payload) in [("shop.order.paid", cbor(&1)), ("shop.order.dispatched", vec![0xf6])] {
        let mut longer = payload.clone();
        longer.push(0x01);
        stored("shop.order", name, &payload).decode::<OrderEvent>().unwrap();
        let error = stored("shop.order", name, &longer).decode::<OrderEvent>().unwrap_err();
        assert!(matches!(error.kind, DecodeErrorKind::Payload(_)), "{error}");
    }
}
