use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Aggregate;
use crate::invalid_option::{InvalidOption, at_least, within};
use crate::store::SnapshotRevision;

/// Upper limit for commands in flight of one kind: each takes memory.
pub(crate) const MOST_IN_FLIGHT: usize = 1_000_000;

/// Default limit for commands in flight for one aggregate.
const IN_FLIGHT_EACH: usize = 1_024;

/// Options for the actors of one kind of aggregate.
///
/// The defaults suit a service with many small aggregates.
pub struct AggregateOptions<A> {
    pub(crate) live: usize,
    pub(crate) idle: Duration,
    pub(crate) in_flight: usize,
    in_flight_each: Option<usize>,
    pub(crate) admission: Duration,
    pub(crate) attempts: u32,
    pub(crate) command_window: usize,
    pub(crate) snapshots: Option<Snapshotting<A>>,
    aggregate: PhantomData<fn() -> A>,
}

impl<A> Default for AggregateOptions<A> {
    fn default() -> Self {
        Self {
            live: 10_000,
            idle: Duration::from_secs(300),
            in_flight: 4_096,
            in_flight_each: None,
            admission: Duration::from_secs(1),
            attempts: 10,
            command_window: 1_000,
            snapshots: None,
            aggregate: PhantomData,
        }
    }
}

impl<A: Aggregate> AggregateOptions<A> {
    /// Creates options with the defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the maximum number of aggregates in memory.
    ///
    /// At the limit, a new aggregate evicts the least recently used idle one. Default: 10,000.
    /// Range: at least 1.
    #[must_use]
    pub fn max_live(mut self, aggregates: usize) -> Self {
        self.live = aggregates;
        self
    }

    /// Sets how long an aggregate stays in memory without a command.
    ///
    /// Default: 5 minutes. Range: any. The router checks every quarter of this time, but at most
    /// every 10 ms and at least every 30 s. Zero evicts an aggregate as soon as it is idle; the
    /// next command folds its stream again.
    #[must_use]
    pub fn idle_timeout(mut self, idle: Duration) -> Self {
        self.idle = idle;
        self
    }

    /// Sets the maximum number of commands in flight for this kind of aggregate.
    ///
    /// Further callers wait for [`admission_timeout`](Self::admission_timeout). Default: 4,096.
    /// Range: 1 to 1,000,000.
    #[must_use]
    pub fn max_in_flight(mut self, commands: usize) -> Self {
        self.in_flight = commands;
        self
    }

    /// Sets the maximum number of commands in flight for one aggregate.
    ///
    /// The next command fails with `Overloaded` at once, so that a hot aggregate cannot starve the
    /// others. Default: 1,024, or [`max_in_flight`](Self::max_in_flight) if that is less. Range: 1
    /// to 1,000,000.
    #[must_use]
    pub fn max_in_flight_per_aggregate(mut self, commands: usize) -> Self {
        self.in_flight_each = Some(commands);
        self
    }

    /// Sets how long a command waits for a permit before it fails with `Overloaded`.
    ///
    /// [`max_in_flight`](Self::max_in_flight) limits the permits. Default: 1 s. Range: any; zero
    /// does not wait.
    #[must_use]
    pub fn admission_timeout(mut self, timeout: Duration) -> Self {
        self.admission = timeout;
        self
    }

    /// Sets how many times a command is decided while other writers change the stream.
    ///
    /// Default: 10. Range: at least 1.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// Sets how many of its latest durable commands an aggregate keeps in memory.
    ///
    /// This is the deduplication window; an entry takes about 100 bytes. The actor looks up earlier
    /// commands in the store, so every repeated command is recognised. Default: 1,000. Range: any;
    /// with zero, the actor looks up each command.
    ///
    /// A command with a UUIDv7 needs a look-up only if its id is older than an id that left the
    /// window. If clients have different clocks, choose the number of commands that arrive within
    /// the difference.
    #[must_use]
    pub fn command_window(mut self, commands: usize) -> Self {
        self.command_window = commands;
        self
    }

    /// Takes a snapshot every `events` events, so that folding starts from the snapshot.
    ///
    /// Default: off. Range of `events`: at least 1.
    ///
    /// Increase `revision` with every change of the struct or of `apply`. The actor ignores a snapshot
    /// of another revision, or one that does not decode, and folds the stream from its start. The actor stores no snapshot that decodes to other
    /// content. A field that serde skips (`#[serde(skip)]`) has its default after a load: such a state
    /// has no use for snapshots.
    #[must_use]
    pub fn snapshot_every(mut self, events: u64, revision: SnapshotRevision) -> Self
    where
        A: Serialize + DeserializeOwned,
    {
        self.snapshots = Some(Snapshotting {
            every: events,
            revision: revision.0,
            encode: crate::codec::encode_snapshot,
            decode: crate::codec::from_cbor,
        });
        self
    }
}

impl<A> AggregateOptions<A> {
    /// Returns the maximum number of commands in flight for one aggregate.
    pub(crate) fn in_flight_each(&self) -> usize {
        self.in_flight_each.unwrap_or(IN_FLIGHT_EACH.min(self.in_flight))
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        at_least("AggregateOptions::max_live", self.live, 1)?;
        within("AggregateOptions::max_in_flight", self.in_flight, 1..=MOST_IN_FLIGHT)?;
        within("AggregateOptions::max_in_flight_per_aggregate", self.in_flight_each(), 1..=MOST_IN_FLIGHT)?;
        at_least("AggregateOptions::max_attempts", self.attempts, 1)?;
        let every = self.snapshots.as_ref().map_or(1, |snapshots| snapshots.every);
        at_least("AggregateOptions::snapshot_every", every, 1)
    }
}

impl<A> fmt::Debug for AggregateOptions<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AggregateOptions")
            .field("max_live", &self.live)
            .field("idle_timeout", &self.idle)
            .field("max_in_flight", &self.in_flight)
            .field("max_in_flight_per_aggregate", &self.in_flight_each())
            .field("admission_timeout", &self.admission)
            .field("attempts", &self.attempts)
            .field("command_window", &self.command_window)
            .field("snapshots", &self.snapshots)
            .finish()
    }
}

/// The snapshot policy of one kind of aggregate.
///
/// It holds the two functions that need a serde type. Therefore only aggregates with snapshots
/// must be serde types.
pub(crate) struct Snapshotting<A> {
    pub(crate) every: u64,
    pub(crate) revision: u32,
    pub(crate) encode: fn(&A) -> Result<Vec<u8>, String>,
    pub(crate) decode: fn(&[u8]) -> Result<A, String>,
}

impl<A> fmt::Debug for Snapshotting<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshotting").field("every", &self.every).field("revision", &self.revision).finish()
    }
}
