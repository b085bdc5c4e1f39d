use std::fmt::Debug;

use chrono::DateTime;
use uuid::Uuid;

use crate::codec::Codec;
use crate::event::{Event, Metadata, NewEvent, Position, RecordedEvent, StreamId, Version};

/// Checks that events of your own come out of a store as they went in, in both codecs.
///
/// ```
/// # use serde::{Deserialize, Serialize};
/// # use storied::Event;
/// # #[derive(Debug, PartialEq, Serialize, Deserialize)] enum DoorEvent { Opened { by: String } }
/// # impl Event for DoorEvent { const CATEGORY: &'static str = "door"; }
/// storied::testing::roundtrip([DoorEvent::Opened { by: "Ada".into() }]);
/// ```
///
/// # Panics
/// When a store refuses an event, cannot read it, or reads another event than was written.
pub fn roundtrip<E: Event + Debug + PartialEq>(events: impl IntoIterator<Item = E>) {
    for event in events {
        for codec in [Codec::Cbor, Codec::Json] {
            match read_back(&event, codec) {
                ReadBack::Event(read) => {
                    assert_eq!(
                        read, event,
                        "a store that keeps {codec} reads another event than was written"
                    );
                }
                ReadBack::Refused(reason) => panic!("a store that keeps {codec} refuses {event:?}: {reason}"),
                ReadBack::Unreadable(reason) => {
                    panic!("a store that keeps {codec} cannot read {event:?}: {reason}")
                }
            }
        }
    }
}

/// What comes of storing an event.
#[derive(Debug)]
pub(super) enum ReadBack<E> {
    /// What a reader gets.
    Event(E),
    /// It is not stored.
    Refused(String),
    /// It is stored, and no reader gets it.
    Unreadable(String),
}

/// Encodes an event, and decodes it as a reader does.
pub(super) fn read_back<E: Event>(event: &E, codec: Codec) -> ReadBack<E> {
    let new = match NewEvent::encode(event, codec, &Metadata::default()) {
        Ok(new) => new,
        Err(error) => return ReadBack::Refused(error.to_string()),
    };
    let recorded = RecordedEvent {
        id: new.id,
        stream: StreamId::new(E::CATEGORY, "test").expect("a valid category"),
        version: Version::new(1),
        position: Position::new(1),
        name: new.name,
        codec,
        payload: new.payload,
        command_id: Uuid::nil(),
        metadata: new.metadata,
        recorded_at: DateTime::UNIX_EPOCH,
    };
    match recorded.decode() {
        Ok(read) => ReadBack::Event(read),
        Err(error) => ReadBack::Unreadable(error.to_string()),
    }
}
