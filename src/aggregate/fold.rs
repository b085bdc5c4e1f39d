//! The folded state of an aggregate: the user's state, its version and its recent commands.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Aggregate;
use super::error::{ExecuteError, NotExecutedKind};
use super::options::{AggregateOptions, Snapshotting};
use crate::codec::from_cbor;
use crate::command_id;
use crate::event::{DecodeError, Position, RecordedEvent, StreamId, Version};
use crate::panic::panic_text;
use crate::store::{CommandEvents, EventStore, Snapshot, StoreError};

/// Number of events in the first page of a fold.
const FIRST_PAGE: usize = 500;
/// Maximum number of events in a later page.
const PAGE: usize = 2_000;
/// Approximate maximum size of a later page, in bytes.
const PAGE_BYTES: usize = 4 << 20;

/// The state of an aggregate as of a version.
pub(super) struct HydratedState<A> {
    pub(super) state: A,
    /// Version of the last event folded into `state`.
    pub(super) version: Version,
    /// Version of the last durable event in `state`. Later events are speculative.
    durable: Version,
    /// Position of the last durable event.
    pub(super) position: Position,
    /// Deduplication window. It holds durable commands only.
    pub(super) commands: RecentCommands,
    /// Version of the newest snapshot that was read or taken.
    pub(super) snapshot: Version,
}

impl<A: Aggregate> HydratedState<A> {
    /// Folds a stream: the snapshot if it is usable, then the later events.
    pub(super) async fn load(
        store: &dyn EventStore,
        stream: &StreamId,
        options: &AggregateOptions<A>,
    ) -> Result<Self, FoldError> {
        let snapshot = match &options.snapshots {
            Some(snapshots) => Self::from_snapshot(store, stream, snapshots, options.command_window).await,
            None => None,
        };
        let mut folded = match snapshot {
            Some(folded) => folded,
            None => Self {
                state: catch_panic(A::default)?,
                version: Version::NONE,
                durable: Version::NONE,
                position: Position::START,
                commands: RecentCommands::new(options.command_window),
                snapshot: Version::NONE,
            },
        };
        folded.catch_up(store, stream).await?;
        Ok(folded)
    }

    async fn from_snapshot(
        store: &dyn EventStore,
        stream: &StreamId,
        snapshots: &Snapshotting<A>,
        window: usize,
    ) -> Option<Self> {
        // A snapshot is a cache. If it is unusable, the stream is folded from its start.
        let snapshot = match store.snapshot(stream).await {
            Ok(snapshot) => snapshot?,
            Err(error) => {
                tracing::warn!(%stream, %error, "could not read a snapshot; folding the whole stream");
                return None;
            }
        };
        if snapshot.revision != snapshots.revision {
            tracing::debug!(%stream, revision = snapshot.revision, "ignoring a snapshot of another revision");
            return None;
        }
        let unpacked = from_cbor::<Packed>(&snapshot.state).and_then(|packed| {
            let state =
                catch_panic(|| (snapshots.decode)(&packed.state)).map_err(|panic| format!("{panic:?}"))??;
            Ok((state, packed.position, packed.commands(window)?))
        });
        match unpacked {
            Ok((state, position, commands)) => {
                let version = snapshot.version;
                Some(Self { state, version, durable: version, position, commands, snapshot: version })
            }
            Err(error) => {
                tracing::warn!(%stream, %error, "ignoring a snapshot that does not decode");
                None
            }
        }
    }

    /// Folds the events of the stream that are newer than the state.
    ///
    /// After an error, the state may hold part of them and must be dropped.
    pub(super) async fn catch_up(
        &mut self,
        store: &dyn EventStore,
        stream: &StreamId,
    ) -> Result<(), FoldError> {
        let mut limit = FIRST_PAGE;
        loop {
            let page = store.read_stream(stream, self.version, limit).await?;
            let last = page.len() < limit;
            let size = page.iter().map(RecordedEvent::size).sum::<usize>() / limit;
            limit = (PAGE_BYTES / size.max(1)).clamp(1, PAGE);
            for event in &page {
                self.fold_recorded(stream, event)?;
            }
            if last {
                return Ok(());
            }
        }
    }

    fn fold_recorded(&mut self, stream: &StreamId, event: &RecordedEvent) -> Result<(), FoldError> {
        if event.version != self.version.next() {
            let reason =
                format!("gap in {stream}: version {} is followed by {}", self.version, event.version);
            return Err(StoreError::Corrupt { reason }.into());
        }
        catch_panic(|| {
            self.state.apply(&event.decode::<A::Event>()?);
            Ok::<_, FoldError>(())
        })??;
        self.version = event.version;
        self.durable(event.command_id, event.version, event.version, event.position);
        Ok(())
    }

    /// Marks the folded events `first..=last` of one command as durable.
    pub(super) fn durable(&mut self, command_id: Uuid, first: Version, last: Version, position: Position) {
        self.durable = last;
        self.position = position;
        self.commands.record(command_id, first, last, position);
    }

    /// Returns whether the state holds speculative events, which may never become durable.
    pub(super) fn speculated(&self) -> bool {
        self.version > self.durable
    }

    /// Folds events of a decision, in the form that a reader will decode.
    ///
    /// After a panic of user code, the state must be dropped.
    pub(super) fn fold<'e>(
        &mut self,
        events: impl ExactSizeIterator<Item = &'e A::Event>,
    ) -> Result<(), FoldError> {
        let version = self.version.plus(events.len() as u64);
        catch_panic(|| events.for_each(|event| self.state.apply(event)))?;
        self.version = version;
        Ok(())
    }

    /// Creates the snapshot at the durable version `version` from the encoded state.
    pub(super) fn pack(&self, version: Version, revision: u32, state: Vec<u8>) -> Result<Snapshot, String> {
        let packed = Packed {
            state,
            position: self.position,
            commands: self.commands.pack(),
            forgotten: self.commands.forgotten,
        };
        let state = crate::codec::to_cbor(&packed).map_err(|error| error.to_string())?;
        Ok(Snapshot { version, revision, state: Bytes::from(state) })
    }
}

/// Runs user code and catches a panic.
fn catch_panic<T>(user: impl FnOnce() -> T) -> Result<T, FoldError> {
    catch_unwind(AssertUnwindSafe(user)).map_err(|panic| FoldError::Panicked(panic_text(&*panic)))
}

/// The deduplication window: the latest durable commands, by id (I8).
///
/// The window is bounded. For older commands the store has an index.
#[derive(Debug)]
pub(super) struct RecentCommands {
    by_id: HashMap<Uuid, CommandEvents>,
    /// Ids, oldest first.
    order: VecDeque<Uuid>,
    window: usize,
    /// Greatest id with a time among the commands of the stream that left the window.
    ///
    /// Nil if none of them has a time; `None` if the window holds all commands of the stream.
    forgotten: Option<Uuid>,
}

/// The result of a look-up in the deduplication window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recollection {
    /// The command is durable.
    Known(CommandEvents),
    /// The command is not durable.
    New,
    /// The window does not cover the command.
    Uncertain,
}

impl RecentCommands {
    fn new(window: usize) -> Self {
        Self { by_id: HashMap::new(), order: VecDeque::new(), window, forgotten: None }
    }

    pub(super) fn find(&self, command_id: Uuid) -> Recollection {
        if let Some(events) = self.by_id.get(&command_id) {
            return Recollection::Known(*events);
        }
        // I8: ids are compared only with ids, never with a clock, so clock skew cannot cause an
        // error. An id greater than every id that left the window is none of them.
        match self.forgotten {
            None => Recollection::New,
            Some(forgotten) if command_id::time(command_id).is_some() && command_id > forgotten => {
                Recollection::New
            }
            Some(_) => Recollection::Uncertain,
        }
    }

    /// Records the durable events `first..=last` of a command, or further events of it.
    pub(super) fn record(&mut self, command_id: Uuid, first: Version, last: Version, position: Position) {
        let record = self.by_id.entry(command_id).or_insert_with(|| {
            self.order.push_back(command_id);
            CommandEvents { first, last, position }
        });
        record.last = last;
        record.position = position;
        if self.order.len() > self.window
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_id.remove(&oldest);
            let oldest = if command_id::time(oldest).is_some() { oldest } else { Uuid::nil() };
            self.forgotten = self.forgotten.max(Some(oldest));
        }
    }

    /// Packs ids and numbers without separators.
    ///
    /// A command takes 40 bytes; CBOR would take 60 and be slower.
    fn pack(&self) -> Vec<u8> {
        let mut packed = Vec::with_capacity(self.order.len() * PACKED_COMMAND);
        for (id, record) in self.order.iter().filter_map(|id| Some((id, self.by_id.get(id)?))) {
            packed.extend(id.as_bytes());
            for number in [record.first.get(), record.last.get(), record.position.get()] {
                packed.extend(number.to_be_bytes());
            }
        }
        packed
    }
}

const PACKED_COMMAND: usize = 16 + 3 * 8;

/// The bytes of a snapshot: a CBOR map with `state`, `position`, `commands` and `forgotten`.
#[derive(Serialize, Deserialize)]
struct Packed {
    #[serde(with = "crate::codec::byte_string")]
    state: Vec<u8>,
    position: Position,
    #[serde(with = "crate::codec::byte_string")]
    commands: Vec<u8>,
    /// See [`RecentCommands`].
    forgotten: Option<Uuid>,
}

impl Packed {
    fn commands(&self, window: usize) -> Result<RecentCommands, String> {
        let (records, rest) = self.commands.as_chunks::<PACKED_COMMAND>();
        if !rest.is_empty() {
            return Err("truncated list of commands".into());
        }
        let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
        let mut commands = RecentCommands { forgotten: self.forgotten, ..RecentCommands::new(window) };
        for record in records {
            let id = Uuid::from_slice(&record[..16]).map_err(|error| error.to_string())?;
            commands.record(
                id,
                Version::new(number(&record[16..24])),
                Version::new(number(&record[24..32])),
                Position::new(number(&record[32..])),
            );
        }
        Ok(commands)
    }
}

/// An error while folding a stream. All commands that wait for the stream share it.
#[derive(Debug, Clone)]
pub(crate) enum FoldError {
    Store(StoreError),
    Decode(Arc<DecodeError>),
    Panicked(String),
}

impl FoldError {
    pub(crate) fn into_execute<E>(self, stream: &StreamId) -> ExecuteError<E> {
        match self {
            FoldError::Store(error) => NotExecutedKind::Store(error).into(),
            FoldError::Decode(error) => NotExecutedKind::Decode((*error).clone()).into(),
            FoldError::Panicked(message) => {
                NotExecutedKind::Panicked { stream: stream.clone(), message }.into()
            }
        }
    }
}

impl From<StoreError> for FoldError {
    fn from(error: StoreError) -> Self {
        FoldError::Store(error)
    }
}

impl From<DecodeError> for FoldError {
    fn from(error: DecodeError) -> Self {
        FoldError::Decode(Arc::new(error))
    }
}
