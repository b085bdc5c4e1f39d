use std::time::Duration;

use super::Start;
use crate::invalid_option::{DAY, InvalidOption, at_least, within};
use crate::lease::{self, CurrentTerm};

/// Handling of an event that cannot be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum FailurePolicy {
    /// The projection stops before the event and reports it, until it is resumed or restarted.
    ///
    /// No event is skipped.
    #[default]
    Stop,
    /// The event is parked in one transaction with the checkpoint, and the projection continues
    /// after it.
    ///
    /// The [`ProjectionHandle`](super::ProjectionHandle) lists, retries and discards parked events.
    Park,
}

/// Handling of an event name that is unknown to the [event type](super::Projection::Event).
///
/// Such an event does not decode. A projection of a whole category also receives the events of
/// newer programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum UnknownNames {
    /// The event fails at once, as any undecodable event.
    ///
    /// [`on_failure`](ProjectionOptions::on_failure) then decides.
    #[default]
    Fail,
    /// The projection skips the event and [counts](super::ProjectionStatus::events_skipped) it.
    ///
    /// Each skip costs a transaction; names in the [filter](super::Projection::filter) are cheaper.
    Skip,
}

/// Source of live events.
///
/// Catch-up always reads the store, as does the recovery of events that the live source lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum FollowMode {
    /// The node's feed, which all projections of the node share.
    #[default]
    Feed,
    /// A consumer of its own, on a bus that keeps events (`NatsBus` over JetStream).
    ///
    /// The server selects the wanted event names, and keeps each event until its commit. Suits
    /// projections with few events on a log with many: otherwise every node receives all events. A
    /// read model that every node keeps for itself and a rebuild follow the feed.
    Durable,
}

/// When a projection applies waiting events.
///
/// Catch-up always applies at once, and so does a full [batch](ProjectionOptions::batch_size).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Schedule {
    /// At once.
    #[default]
    Immediate,
    /// After a quiet period: many consecutive events become one transaction.
    Debounced {
        /// Duration without new events.
        quiet: Duration,
        /// Maximum wait of the first event, regardless of later ones.
        cap: Duration,
    },
    /// At most once in this interval.
    Every(Duration),
    /// Only when [triggered](super::ProjectionHandle::trigger), up to the end of the log at that
    /// time.
    ///
    /// A trigger survives a pause, a move to another node, and a restart. Between triggers, the
    /// projection is [waiting](super::ProjectionState::Waiting), also during catch-up. A
    /// [rebuild](super::ProjectionHandle::rebuild) needs no trigger and runs to the end of the log.
    Manual,
}

/// Options of a projection.
#[derive(Debug, Clone)]
pub struct ProjectionOptions {
    pub(crate) partitions: Option<u16>,
    pub(super) batch: usize,
    pub(super) batch_time: Duration,
    pub(super) transaction_timeout: Duration,
    pub(super) attempts: u32,
    pub(super) backoff: (Duration, Duration),
    pub(super) on_failure: FailurePolicy,
    pub(super) unknown_names: UnknownNames,
    pub(super) lease: Duration,
    pub(super) schedule: Schedule,
    pub(crate) follow: FollowMode,
    pub(crate) start: Option<Start>,
    /// Receives the term of each lease of the owner.
    pub(super) term: Option<CurrentTerm>,
}

impl Default for ProjectionOptions {
    fn default() -> Self {
        Self {
            partitions: None,
            batch: 500,
            batch_time: Duration::from_millis(250),
            transaction_timeout: Duration::from_secs(30),
            attempts: 5,
            backoff: (Duration::from_millis(50), Duration::from_secs(5)),
            on_failure: FailurePolicy::Stop,
            unknown_names: UnknownNames::Fail,
            lease: Duration::from_secs(6),
            schedule: Schedule::Immediate,
            follow: FollowMode::Feed,
            start: None,
            term: None,
        }
    }
}

impl ProjectionOptions {
    /// Returns the defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Divides the projection into partitions.
    ///
    /// All nodes that register it share the partitions evenly. A partition applies the events of
    /// [its](crate::Partition) streams, in their order. The other options apply to each partition.
    /// The projection must have an instance for each of them: see [`PerTarget`](super::PerTarget).
    ///
    /// Default: not partitioned. Range: 1 to 256, on a read model that all nodes share. The first
    /// start fixes the number. Nodes beyond the number of partitions stay idle, so choose the
    /// largest number of nodes that you expect. Changing it needs a
    /// [reset](super::ProjectionHandle::reset).
    ///
    /// The partitions of a node share the pages that they read. A node keeps at most 4 pages of
    /// about 4 MiB each, and as many for a rebuild; it drops a page that no partition has used for
    /// 5 s. At the start each partition acquires a lease and claims its checkpoint: some
    /// milliseconds each on SQLite, which commits one after the other.
    #[must_use]
    pub fn partitions(mut self, count: u16) -> Self {
        self.partitions = Some(count);
        self
    }

    /// Sets the maximum number of events in a transaction, and in a read.
    ///
    /// Default: 500. Range: 1 to 100,000. The number adapts to [`batch_time`](Self::batch_time),
    /// starting at 50. A live projection applies the events that have arrived.
    #[must_use]
    pub fn batch_size(mut self, events: usize) -> Self {
        self.batch = events;
        self
    }

    /// Sets the target duration of a transaction.
    ///
    /// If a full batch takes less than half of it, the next batch is twice as large, up to
    /// [`batch_size`](Self::batch_size). If a batch takes longer than the target, the next one is
    /// half as large, down to 1 event. So slow applies commit often, hold no lock for long and
    /// repeat little after a failure, and fast applies need few commits. Default: 250 ms. Range:
    /// any; with zero, one event per transaction.
    #[must_use]
    pub fn batch_time(mut self, target: Duration) -> Self {
        self.batch_time = target;
        self
    }

    /// Sets the time limit of one transaction: its begin, its calls of `apply`, and its commit.
    ///
    /// Also limits any other call to the read model.
    ///
    /// At the limit, the transaction is aborted and its connection closed; the status shows the
    /// error, and the projection retries. The timeout does not count against an event. A full batch
    /// is committed after half of the limit at the latest, so in effect the limit applies to one
    /// call of [`apply`](super::Projection::apply), which is then dropped. On PostgreSQL, the
    /// server has the same limit (`statement_timeout` and `idle_in_transaction_session_timeout`),
    /// and ends a transaction if its connection was cut off. Default: 30 s. Range: 100 ms to 1 day.
    #[must_use]
    pub fn transaction_timeout(mut self, limit: Duration) -> Self {
        self.transaction_timeout = limit;
        self
    }

    /// Sets the total number of attempts for a failing event.
    ///
    /// After the last one, [`on_failure`](Self::on_failure) decides. Undecodable bytes are tried
    /// once, because a retry cannot succeed. Default: 5. Range: at least 1.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// Sets the backoff after the first failure. The backoff doubles, with jitter.
    ///
    /// Failures of the store or the read model use the same backoff, without a limit of attempts.
    /// Default: 50 ms. Range: at least 1 ms.
    #[must_use]
    pub fn initial_backoff(mut self, wait: Duration) -> Self {
        self.backoff.0 = wait;
        self
    }

    /// Sets the maximum backoff.
    ///
    /// Default: 5 s. Range: not less than [`initial_backoff`](Self::initial_backoff); more than 30
    /// years counts as 30 years.
    #[must_use]
    pub fn max_backoff(mut self, wait: Duration) -> Self {
        self.backoff.1 = wait;
        self
    }

    /// Sets the handling of an event that cannot be applied. Default: [`FailurePolicy::Stop`].
    #[must_use]
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.on_failure = policy;
        self
    }

    /// Sets the handling of unknown event names. Default: [`UnknownNames::Fail`].
    #[must_use]
    pub fn unknown_names(mut self, policy: UnknownNames) -> Self {
        self.unknown_names = policy;
        self
    }

    /// Sets the source of live events. Default: [`FollowMode::Feed`].
    ///
    /// With [`FollowMode::Durable`] on a bus that keeps no events, the runtime does not start.
    #[must_use]
    pub fn follow(mut self, mode: FollowMode) -> Self {
        self.follow = mode;
        self
    }

    /// Sets when waiting events are applied. Default: [`Schedule::Immediate`].
    ///
    /// Range of its times: any; more than 30 years counts as 30 years.
    #[must_use]
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets the time between the death of the owning node and the takeover by another one.
    ///
    /// Applies to a shared read model. Default: 6 s. Range: 50 ms to 1 day.
    #[must_use]
    pub fn lease(mut self, ttl: Duration) -> Self {
        self.lease = ttl;
        self
    }

    /// Sets the start position of the projection in the log.
    ///
    /// It takes effect at the first run of a projection of this name, and is stored beside its
    /// checkpoints. From then on, no reset, rebuild, other partition or later value of this option
    /// applies an earlier event. A read model without stored checkpoints
    /// ([`InMemory`](super::InMemory)) resolves it at every start of the node.
    ///
    /// Default: [`Start::Beginning`]. [`AtLeastOnce`](super::AtLeastOnce) has no default on a log with
    /// events, because those may have had their effects already: the runtime does not start without
    /// this option.
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.start = Some(start);
        self
    }

    /// Publishes the term of each lease of the owner of a projection without partitions.
    pub(crate) fn publish_term(mut self, term: CurrentTerm) -> Self {
        self.term = Some(term);
        self
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        within("ProjectionOptions::batch_size", self.batch, 1..=100_000)?;
        let range = Duration::from_millis(100)..=DAY;
        within("ProjectionOptions::transaction_timeout", self.transaction_timeout, range)?;
        at_least("ProjectionOptions::max_attempts", self.attempts, 1)?;
        let (first, max) = self.backoff;
        at_least("ProjectionOptions::initial_backoff", first, Duration::from_millis(1))?;
        at_least("ProjectionOptions::max_backoff", max, first)?;
        lease::check("ProjectionOptions::lease", self.lease)
    }
}
