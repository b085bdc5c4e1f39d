use std::time::Duration;

use super::Start;
use crate::invalid_option::{DAY, InvalidOption, at_least, within};
use crate::lease;

/// What becomes of an event that cannot be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum FailurePolicy {
    /// The projection stands still before the event, and says so, until it is resumed or restarted. Nothing is skipped.
    #[default]
    Stop,
    /// The event is put aside, in one transaction with the checkpoint, and the projection goes on behind it. Parked events
    /// are listed, retried and discarded through the [`ProjectionHandle`](super::ProjectionHandle).
    Park,
}

/// What becomes of an event whose name the event type does not know that the projection [decodes](crate::RecordedEvent::decode):
/// one that asks for a whole category also gets what newer programs write there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum UnknownNames {
    /// It fails as what else does not decode: [`on_failure`](ProjectionOptions::on_failure) decides at once.
    #[default]
    Fail,
    /// The projection goes on behind it, and counts it as [passed over](super::ProjectionStatus::events_passed_over). It costs a
    /// transaction of its own; to ask for names in the [filter](super::Projection::filter) is cheaper.
    PassOver,
}

/// What a projection follows at the tip of the log; it catches up from the store in any case, and reads there what the other
/// way has lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum FollowMode {
    /// What its node sees of the log, which all projections of the node share.
    #[default]
    Feed,
    /// A consumer of its own, on a bus that keeps events (`NatsBus` over JetStream): the server picks out the names that it asks
    /// for, and keeps each event until it is committed. For projections of which few events are, on a log of which most are not:
    /// without this, every node gets all of them. A read model that every node has for itself, and one that is being rebuilt,
    /// follow the feed.
    Durable,
}

/// When a projection applies what has come. Behind the tip of the log it always catches up at once, and a full
/// [batch](ProjectionOptions::batch_size) is never waited with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Schedule {
    /// At once.
    #[default]
    Immediate,
    /// When no more has come for a while: many events that follow each other become one transaction.
    Debounced {
        /// How long nothing has to have come.
        quiet: Duration,
        /// How long the first event waits at most, however many follow it.
        cap: Duration,
    },
    /// At most once in this time.
    Every(Duration),
    /// When it is [triggered](super::ProjectionHandle::trigger), up to what is in the log then, and no farther; also when it is
    /// paused, moved to another node or started again meanwhile. In between it is [waiting](super::ProjectionState::Waiting), also
    /// behind the tip of the log. What is [rebuilt](super::ProjectionHandle::rebuild) goes to the tip without being triggered.
    Manual,
}

/// How a projection is run.
#[derive(Debug, Clone)]
pub struct ProjectionOptions {
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
}

impl Default for ProjectionOptions {
    fn default() -> Self {
        Self {
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
        }
    }
}

impl ProjectionOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many events at most are applied in one transaction, and read at a time. Default: 500. Range: 1 to 100,000. How many
    /// they are adapts to [`batch_time`](Self::batch_time), from 50 on; at the tip of the log it is whatever has gathered.
    #[must_use]
    pub fn batch_size(mut self, events: usize) -> Self {
        self.batch = events;
        self
    }

    /// How long a transaction is to take: a full batch that took less than half of that makes the next one twice as large (up to
    /// [`batch_size`](Self::batch_size)), one that took longer makes it half as large (down to one event). So what is slow to
    /// apply commits often, holds no lock for long and repeats little after a failure, and what is quick pays for few commits.
    /// Default: 250 ms. Range: any; with zero, one event a transaction.
    #[must_use]
    pub fn batch_time(mut self, target: Duration) -> Self {
        self.batch_time = target;
        self
    }

    /// Time limit of one transaction: of its begin, the calls of `apply` in it, and its commit. Also of any other call to the read model.
    ///
    /// At the limit the transaction is given up and its connection closed; the status shows the error, and the projection retries. No
    /// event is to blame. A full batch is committed after half of the limit at the latest, so in effect this limits one call of
    /// [`apply`](super::Projection::apply), which is dropped then. On PostgreSQL the server has the same limit (`statement_timeout` and
    /// `idle_in_transaction_session_timeout`), and ends a transaction whose connection was cut off. Default: 30 s. Range: 100 ms to 1 day.
    #[must_use]
    pub fn transaction_timeout(mut self, limit: Duration) -> Self {
        self.transaction_timeout = limit;
        self
    }

    /// How often a failing event is tried in all before [`on_failure`](Self::on_failure) decides. Bytes that do not decode
    /// are tried once: they never will. Default: 5. Range: at least 1.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// How long to wait after the first failure, and at most after many: the wait doubles, with jitter. Failures of the store
    /// or the read model wait as long, but never give up. Default: 50 ms and 5 s. Range: at least 1 ms, and `max` not less than
    /// `first`; more than 30 years counts as 30 years.
    #[must_use]
    pub fn backoff(mut self, first: Duration, max: Duration) -> Self {
        self.backoff = (first, max);
        self
    }

    /// What becomes of an event that cannot be applied. [`FailurePolicy::Stop`] by default.
    #[must_use]
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.on_failure = policy;
        self
    }

    /// What becomes of events with a name that the projection's event type does not know. [`UnknownNames::Fail`] by default.
    #[must_use]
    pub fn unknown_names(mut self, policy: UnknownNames) -> Self {
        self.unknown_names = policy;
        self
    }

    /// What it follows. [`FollowMode::Feed`] by default. With [`FollowMode::Durable`] on a bus that keeps nothing, the runtime does
    /// not start.
    #[must_use]
    pub fn follow(mut self, mode: FollowMode) -> Self {
        self.follow = mode;
        self
    }

    /// When it applies what has come. Default: [`Schedule::Immediate`]. Range of its times: any; more than 30 years counts as
    /// 30 years.
    #[must_use]
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// For a read model that all nodes share: how long after the death of the owning node another one takes over. Default:
    /// 6 s. Range: 50 ms to 1 day.
    #[must_use]
    pub fn lease(mut self, ttl: Duration) -> Self {
        self.lease = ttl;
        self
    }

    /// Where in the log the projection begins. It counts when a projection of this name runs for the first time, and is kept
    /// beside its checkpoints: from then on no reset, rebuild, other partition or later value of this option applies an event
    /// before it. Where nothing is kept ([`InMemory`](super::InMemory)), it is found again at every start of the node.
    ///
    /// Default: [`Start::Beginning`]. [`External`](super::External) has no default on a log that has events: they may have been
    /// acted upon in another way, so the runtime does not start without this option.
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.start = Some(start);
        self
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        within("ProjectionOptions::batch_size", self.batch, 1..=100_000)?;
        let range = Duration::from_millis(100)..=DAY;
        within("ProjectionOptions::transaction_timeout", self.transaction_timeout, range)?;
        at_least("ProjectionOptions::attempts", self.attempts, 1)?;
        let (first, max) = self.backoff;
        at_least("ProjectionOptions::backoff (first)", first, Duration::from_millis(1))?;
        at_least("ProjectionOptions::backoff (max)", max, first)?;
        lease::check("ProjectionOptions::lease", self.lease)
    }
}
