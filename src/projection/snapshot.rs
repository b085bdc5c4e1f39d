//! Snapshots of an in-memory read model, for a start without applying the whole log.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use chrono::{DateTime, TimeZone, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{ApplyError, SharedState};
use crate::codec::{encode_snapshot, fingerprint, from_cbor, to_cbor};
use crate::event::{EventName, Position, StreamId, Version};
use crate::panic::panic_text;
use crate::store::{Filter, ParkedEvent, SnapshotRevision};

/// State of an in-memory projection that can be saved and loaded as a whole.
///
/// See [`InMemory::snapshot_every`](super::InMemory::snapshot_every).
///
/// Implemented for a [`RwLock`] or a [`Mutex`] over any serde type, as CBOR. A poisoned lock is not
/// saved, because a panic may have left its state half changed. Loading clears the poison, because
/// it replaces the whole state.
pub trait SnapshotState: Send + Sync + 'static {
    /// Encodes the state, in any format. Called between two events; no event is applied meanwhile.
    ///
    /// # Errors
    /// If no snapshot of the state is possible now. The error is logged, and retried when the next
    /// snapshot is due.
    fn save(&self) -> Result<Vec<u8>, ApplyError>;

    /// Replaces the whole state by the result of [`save`](Self::save).
    ///
    /// Called before the first event.
    ///
    /// # Errors
    /// If these bytes are unusable. The state must then be unchanged, because the log is applied
    /// from its start.
    fn load(&self, snapshot: &[u8]) -> Result<(), ApplyError>;
}

const POISONED: &str = "the lock of the state is poisoned: a panic may have left the state half changed";

impl<T: Serialize + DeserializeOwned + Send + Sync + 'static> SnapshotState for RwLock<T> {
    fn save(&self) -> Result<Vec<u8>, ApplyError> {
        Ok(encode_snapshot(&*self.read().map_err(|_| POISONED)?)?)
    }

    fn load(&self, snapshot: &[u8]) -> Result<(), ApplyError> {
        let state = from_cbor(snapshot)?;
        *self.write().unwrap_or_else(PoisonError::into_inner) = state;
        self.clear_poison();
        Ok(())
    }
}

impl<T: Serialize + DeserializeOwned + Send + 'static> SnapshotState for Mutex<T> {
    fn save(&self) -> Result<Vec<u8>, ApplyError> {
        Ok(encode_snapshot(&*self.lock().map_err(|_| POISONED)?)?)
    }

    fn load(&self, snapshot: &[u8]) -> Result<(), ApplyError> {
        let state = from_cbor(snapshot)?;
        *self.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.clear_poison();
        Ok(())
    }
}

/// Snapshot settings; see [`InMemory::snapshot_every`](super::InMemory::snapshot_every).
#[derive(Clone)]
pub struct Snapshots {
    pub(super) every: u64,
    pub(super) revision: u32,
    state: Arc<dyn SnapshotState>,
}

impl Snapshots {
    pub(super) fn new(every: u64, revision: SnapshotRevision, state: Arc<dyn SnapshotState>) -> Self {
        Self { every, revision: revision.0, state }
    }

    /// Number of events between two snapshots.
    pub(crate) fn every(&self) -> u64 {
        self.every
    }

    /// Returns the state; one projection at a time may fold into it.
    pub(crate) fn shared_state(&self) -> SharedState {
        SharedState::of(&self.state)
    }

    /// Encodes the current state together with its filter, start position and parked events.
    pub(super) fn pack(
        &self,
        filter: &Filter,
        floor: Position,
        parked: &[ParkedEvent],
    ) -> Result<Vec<u8>, String> {
        let state = contained(|| self.state.save())?;
        let parked = parked.iter().map(PackedEvent::from).collect();
        let packed = Packed { state, filter: fingerprint_of(filter, floor)?, parked };
        to_cbor(&packed).map_err(|error| error.to_string())
    }

    /// Loads the state; returns the events that are parked in it.
    pub(super) fn unpack(
        &self,
        snapshot: &[u8],
        filter: &Filter,
        floor: Position,
    ) -> Result<Vec<ParkedEvent>, String> {
        let packed: Packed = from_cbor(snapshot)?;
        if packed.filter != fingerprint_of(filter, floor)? {
            return Err("the snapshot has another filter or another start position".into());
        }
        let parked = packed.parked.into_iter().map(ParkedEvent::try_from).collect::<Result<_, _>>()?;
        // Last: after any other error, the state is unchanged.
        contained(|| self.state.load(&packed.state))?;
        Ok(parked)
    }
}

impl fmt::Debug for Snapshots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshots")
            .field("every", &self.every)
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}

/// Runs the user's code.
fn contained<T>(user: impl FnOnce() -> Result<T, ApplyError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(user)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("the snapshot state panicked: {}", panic_text(&*panic))),
    }
}

/// Returns the stream of a projection's snapshot; `None` if the name is no valid stream id.
pub(super) fn snapshot_stream(projection: &str) -> Option<StreamId> {
    StreamId::reserved("@projection", projection).ok()
}

/// Returns a fingerprint of a filter and a start position.
fn fingerprint_of(filter: &Filter, floor: Position) -> Result<Vec<u8>, String> {
    let names = filter.names().map(|names| names.iter().map(EventName::as_str).collect::<Vec<_>>());
    let categories = filter
        .categories()
        .map(|categories| categories.iter().map(|category| category.as_str()).collect::<Vec<_>>());
    let streams = filter.streams().map(|streams| streams.iter().map(ToString::to_string).collect::<Vec<_>>());
    let streams = streams.as_ref().map(|streams| streams.iter().map(String::as_str).collect::<Vec<_>>());
    // Sorted by name: the order of a list does not matter.
    let mut all = BTreeMap::from([("names", names), ("categories", categories), ("streams", streams)]);
    let floor = (floor > Position::START).then(|| floor.to_string());
    if let Some(floor) = &floor {
        all.insert("floor", Some(vec![floor]));
    }
    let fingerprint = fingerprint(&all).map_err(|error| error.to_string())?;
    Ok(fingerprint.to_be_bytes().into())
}

/// A snapshot's bytes: CBOR map with the keys `state`, `filter`, `parked`.
///
/// Its version is the position up to which the log is folded in.
#[derive(Serialize, Deserialize)]
struct Packed {
    #[serde(with = "crate::codec::byte_string")]
    state: Vec<u8>,
    #[serde(with = "crate::codec::byte_string")]
    filter: Vec<u8>,
    parked: Vec<PackedEvent>,
}

#[derive(Serialize, Deserialize)]
struct PackedEvent {
    position: u64,
    id: Uuid,
    category: String,
    stream: String,
    version: u64,
    name: String,
    error: String,
    attempts: u32,
    /// Microseconds since 1970.
    at: i64,
}

impl From<&ParkedEvent> for PackedEvent {
    fn from(event: &ParkedEvent) -> Self {
        Self {
            position: event.position.get(),
            id: event.event_id,
            category: event.stream.category().to_owned(),
            stream: event.stream.id().to_owned(),
            version: event.version.get(),
            name: event.name.as_str().to_owned(),
            error: event.error.clone(),
            attempts: event.attempts,
            at: event.parked_at.timestamp_micros(),
        }
    }
}

impl TryFrom<PackedEvent> for ParkedEvent {
    type Error = String;

    fn try_from(event: PackedEvent) -> Result<Self, String> {
        let at: Option<DateTime<Utc>> = Utc.timestamp_micros(event.at).single();
        Ok(Self {
            position: Position::new(event.position),
            event_id: event.id,
            stream: StreamId::new(event.category, event.stream).map_err(|error| error.to_string())?,
            version: Version::new(event.version),
            name: EventName::new(event.name).map_err(|error| error.to_string())?,
            error: event.error,
            attempts: event.attempts,
            parked_at: at.ok_or("the time of a parked event is out of range")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Category;

    fn filter() -> Filter {
        let stream = StreamId::new("order", "17").unwrap();
        Filter::all().with_names([EventName::new("order.placed").unwrap()]).with_streams([stream])
    }

    fn parked() -> ParkedEvent {
        ParkedEvent {
            position: Position::new(41),
            event_id: Uuid::from_u128(7),
            stream: StreamId::new("order", "17").unwrap(),
            version: Version::new(3),
            name: EventName::new("order.placed").unwrap(),
            error: "no".into(),
            attempts: 5,
            parked_at: Utc.timestamp_micros(1_700_000_000_000_001).unwrap(),
        }
    }

    fn snapshots() -> (Arc<RwLock<Vec<u64>>>, Snapshots) {
        let state = Arc::new(RwLock::new(vec![1, 2, 300]));
        (state.clone(), Snapshots::new(0, SnapshotRevision(1), state))
    }

    #[test]
    fn a_snapshot_round_trips() {
        let (state, snapshots) = snapshots();
        let bytes = snapshots.pack(&filter(), Position::START, &[parked()]).unwrap();
        *state.write().unwrap() = Vec::new();
        assert_eq!(snapshots.unpack(&bytes, &filter(), Position::START).unwrap(), [parked()]);
        assert_eq!(*state.read().unwrap(), [1, 2, 300]);
        // Stored on users' disks.
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, PINNED);
    }

    const PINNED: &str = concat!(
        "a36573746174654683010219012c6666696c74657250ff60a301bfaa46079e96e3660dff7331667061726b656481a968",
        "706f736974696f6e182962696450000000000000000000000000000000076863617465676f7279656f72646572667374",
        "7265616d6231376776657273696f6e03646e616d656c6f726465722e706c61636564656572726f72626e6f6861747465",
        "6d707473056261741b00060a24181e4001",
    );

    #[test]
    fn filters_are_distinguished() {
        let (order, placed) = (Category::new("order").unwrap(), EventName::new("order").unwrap());
        let filters = [
            Filter::all(),
            Filter::all().with_names([]),
            Filter::all().with_categories([]),
            Filter::all().with_categories([order]),
            Filter::all().with_names([placed]),
            filter(),
        ];
        let (_, snapshots) = snapshots();
        for one in &filters {
            let bytes = snapshots.pack(one, Position::START, &[]).unwrap();
            for other in &filters {
                assert_eq!(
                    snapshots.unpack(&bytes, other, Position::START).is_ok(),
                    one == other,
                    "{one:?} and {other:?}"
                );
            }
        }
    }

    #[test]
    fn a_poisoned_state_is_not_saved() {
        let (state, snapshots) = snapshots();
        let bytes = snapshots.pack(&filter(), Position::START, &[]).unwrap();
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let mut state = state.write().unwrap();
            state.push(4);
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        assert_eq!(snapshots.pack(&filter(), Position::START, &[]).unwrap_err(), POISONED);
        snapshots.unpack(&bytes, &filter(), Position::START).unwrap();
        assert_eq!(*state.read().unwrap(), [1, 2, 300]);
    }

    #[test]
    fn arbitrary_bytes_never_panic_and_refused_ones_change_nothing() {
        let (state, snapshots) = snapshots();
        let seed = snapshots.pack(&filter(), Position::START, &[parked()]).unwrap();
        crate::fuzz::fuzz("a projection's snapshot", vec![seed], |bytes| {
            *state.write().unwrap() = vec![42];
            let read = snapshots.unpack(bytes, &filter(), Position::START);
            assert!(read.is_ok() || *state.read().unwrap() == [42]);
            read.map_or_else(|error| error, |parked| parked.len().to_string())
        });
    }

    #[test]
    fn snapshot_streams_are_no_user_streams() {
        let stream = snapshot_stream("revenue").unwrap();
        assert!(Category::new(stream.category()).is_err());
        assert_eq!(stream.id(), "revenue");
        assert!(snapshot_stream("").is_none() && snapshot_stream("a\0").is_none());
    }
}
