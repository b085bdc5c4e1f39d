use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Aggregate;
use crate::invalid_option::{InvalidOption, at_least, within};

/// Most commands of one kind that may be under way: each takes memory.
pub(crate) const MOST_IN_FLIGHT: usize = 1_000_000;

/// Number of commands that may be under way for one aggregate, unless set.
const IN_FLIGHT_EACH: usize = 1_024;

/// How the actors of one kind of aggregate are kept. The defaults suit a service with many small aggregates.
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
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many aggregates may be live at a time; the least recently used one leaves memory for a new one. Default: 10,000.
    /// Range: at least 1.
    #[must_use]
    pub fn max_live(mut self, aggregates: usize) -> Self {
        self.live = aggregates;
        self
    }

    /// How long an aggregate stays in memory without a command. Default: 5 minutes. Range: any. It is looked for such aggregates every
    /// quarter of that, but not more often than every 10 ms: zero means that one goes about as soon as it has nothing to do, and is
    /// folded again for the next command.
    #[must_use]
    pub fn idle_timeout(mut self, idle: Duration) -> Self {
        self.idle = idle;
        self
    }

    /// How many commands of this kind may be under way at a time; further callers wait for
    /// [`admission_timeout`](Self::admission_timeout). Default: 4,096. Range: 1 to 1,000,000.
    #[must_use]
    pub fn max_in_flight(mut self, commands: usize) -> Self {
        self.in_flight = commands;
        self
    }

    /// How many of them may be for one aggregate; the next is answered `Overloaded` at once, so that a hot aggregate
    /// cannot rob the others. Default: 1,024, or [`max_in_flight`](Self::max_in_flight) if that is less. Range: 1 to
    /// 1,000,000.
    #[must_use]
    pub fn max_in_flight_each(mut self, commands: usize) -> Self {
        self.in_flight_each = Some(commands);
        self
    }

    /// How long a command waits for its turn at [`max_in_flight`](Self::max_in_flight) before it is answered
    /// `Overloaded`. Default: 1 s. Range: any; with zero it does not wait.
    #[must_use]
    pub fn admission_timeout(mut self, timeout: Duration) -> Self {
        self.admission = timeout;
        self
    }

    /// How often a command is decided when others keep writing to the stream. Default: 10. Range: at least 1.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// How many of its last effective commands an aggregate keeps in memory, about 100 bytes each. Earlier ones are looked up
    /// in the store, so a repeated command is recognised either way. Default: 1,000. Range: any; with zero each command is
    /// looked up. A new command with a UUIDv7 as its id is not looked up unless it is older than what fell out of the window:
    /// for an aggregate whose commands come from clients with different clocks, choose as many as it gets in the difference.
    #[must_use]
    pub fn command_window(mut self, commands: usize) -> Self {
        self.command_window = commands;
        self
    }

    /// Keeps a snapshot every `events` events, so that a long stream is not folded from its start. Default: off. Range of
    /// `events`: at least 1.
    ///
    /// `revision` names the shape of the state: raise it with every change of the struct or of `apply`. A snapshot of
    /// another revision, or one that does not decode, is ignored and the stream folded from its start.
    #[must_use]
    pub fn snapshot_every(mut self, events: u64, revision: u32) -> Self
    where
        A: Serialize + DeserializeOwned,
    {
        self.snapshots = Some(Snapshotting {
            every: events,
            revision,
            encode: |state| crate::codec::to_cbor(state).map_err(|error| error.to_string()),
            decode: crate::codec::from_cbor,
        });
        self
    }
}

impl<A> AggregateOptions<A> {
    /// How many commands may be under way for one aggregate.
    pub(crate) fn in_flight_each(&self) -> usize {
        self.in_flight_each.unwrap_or(IN_FLIGHT_EACH.min(self.in_flight))
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        at_least("AggregateOptions::max_live", self.live, 1)?;
        within("AggregateOptions::max_in_flight", self.in_flight, 1..=MOST_IN_FLIGHT)?;
        within("AggregateOptions::max_in_flight_each", self.in_flight_each(), 1..=MOST_IN_FLIGHT)?;
        at_least("AggregateOptions::attempts", self.attempts, 1)?;
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
            .field("max_in_flight_each", &self.in_flight_each())
            .field("admission_timeout", &self.admission)
            .field("attempts", &self.attempts)
            .field("command_window", &self.command_window)
            .field("snapshots", &self.snapshots)
            .finish()
    }
}

/// When and how snapshots are taken. Holds the two functions that need the aggregate to be a serde type, so that only
/// aggregates with snapshots have to be one.
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
