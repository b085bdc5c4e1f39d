//! The group-commit writer: concurrent appends of all aggregates of a process share transactions.
//!
//! There is no timer. A transaction takes all appends that were queued while the previous one was
//! in flight, so a lone append never waits and a busy store gets large transactions. Each stream is
//! in at most one transaction in flight.
//!
//! If an append fails, the appends decided on its events fail too, and no others. If the store
//! refuses the content of a transaction, the writer sends its appends again in halves, until the
//! refused append is alone.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use serde::Serialize;
use tokio::sync::mpsc;

use super::append::{Append, AppendError, ExpectedVersion};
use super::error::StoreError;
use super::{Appended, EventStore};
use crate::event::{NewEvent, Position, StreamId, Version};
use crate::future::BoxFuture;
use crate::panic::panic_text;
use crate::telemetry::{Metrics, Timer};

/// Maximum number of `yield_now` calls before a transaction, if none was ready after the last one.
///
/// Callers that were just answered submit again after some hops (actor, caller, router, actor).
/// Without a yield for each hop, the first of them gets a transaction alone. Cost: about 1 µs.
const TURNS: usize = 4;

/// Maximum number of events in a transaction; a larger append gets a transaction of its own.
const BATCH_EVENTS: usize = 512;
/// Maximum number of payload and metadata bytes in a transaction; likewise.
const BATCH_BYTES: usize = 1 << 20;
/// Maximum number of queued appends; beyond it, submitting waits.
const QUEUE: usize = 4_096;

/// The result of an append.
pub(crate) type AppendResult = Result<Committed, AppendError>;

/// A durable append.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Committed {
    /// Position of the last event.
    pub(crate) position: Position,
}

/// A chain of appends, each decided on events of the previous one that were not durable yet.
///
/// If an append fails, the writer breaks the chain and refuses the rest of it, even if an expected
/// version happens to match: the rest was decided on events that do not exist.
#[derive(Debug, Clone)]
pub(crate) struct SpeculationChain(Arc<AtomicBool>);

impl SpeculationChain {
    pub(crate) fn new() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    fn holds(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn cut(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// An append to one stream at exactly the version `expected`.
pub(crate) struct PendingAppend {
    pub(crate) stream: StreamId,
    pub(crate) expected: Version,
    pub(crate) events: Vec<NewEvent>,
    pub(crate) chain: SpeculationChain,
    /// Maximum number of appends in its transaction: no limit at first, then halved each time the
    /// store refuses the content of its transaction.
    pub(crate) batch_limit: usize,
    /// Called once, from the writer's task; must not block.
    pub(crate) done: Box<dyn FnOnce(AppendResult) + Send>,
}

impl PendingAppend {
    fn bytes(&self) -> usize {
        self.events.iter().map(|event| event.payload.len() + event.metadata.len() + 64).sum()
    }
}

/// The counters of a writer, for its status.
#[derive(Debug, Default)]
struct Counters {
    transactions: AtomicU64,
    appends: AtomicU64,
    events: AtomicU64,
    conflicts: AtomicU64,
    failures: AtomicU64,
}

/// The totals of a writer since its start. Serializes as a map of its fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct WriterStatus {
    /// Append calls to the store; each is one transaction.
    pub transactions: u64,
    /// Appends that became durable.
    pub appends: u64,
    /// Events that became durable.
    pub events: u64,
    /// Appends refused because of a version conflict.
    pub conflicts: u64,
    /// Appends that failed because the store failed.
    pub failures: u64,
    /// Appends in the queue.
    pub queued: usize,
}

/// A handle through which aggregates submit appends; cheap to clone.
///
/// The writer's task ends when the last handle is dropped and all submissions are answered.
#[derive(Clone)]
pub(crate) struct GroupCommitter {
    submissions: mpsc::Sender<PendingAppend>,
    counters: Arc<Counters>,
    metrics: Metrics,
}

impl fmt::Debug for GroupCommitter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupCommitter").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl GroupCommitter {
    /// Starts the writer of a store.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn start(store: Arc<dyn EventStore>, metrics: Metrics) -> Self {
        let (submissions, receiver) = mpsc::channel(QUEUE);
        let counters = Arc::new(Counters::default());
        let concurrency = store.info().append_concurrency.max(1);
        let task = Committer {
            store,
            concurrency,
            counters: counters.clone(),
            metrics: metrics.clone(),
            streams: HashMap::new(),
            ready: VecDeque::new(),
            waiting: 0,
            running: FuturesUnordered::new(),
            turns: 0,
            expected: 0,
        };
        tokio::spawn(task.run(receiver));
        Self { submissions, counters, metrics }
    }

    /// Returns the metrics that submitters also record to.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Submits an append; waits while the queue is full.
    ///
    /// `done` is always called, unless the writer has ended and this returns the submission.
    pub(crate) async fn submit(&self, submission: PendingAppend) -> Result<(), PendingAppend> {
        self.submissions.send(submission).await.map_err(|error| error.0)
    }

    pub(crate) fn status(&self) -> WriterStatus {
        let counters = &self.counters;
        WriterStatus {
            transactions: counters.transactions.load(Ordering::Relaxed),
            appends: counters.appends.load(Ordering::Relaxed),
            events: counters.events.load(Ordering::Relaxed),
            conflicts: counters.conflicts.load(Ordering::Relaxed),
            failures: counters.failures.load(Ordering::Relaxed),
            queued: self.submissions.max_capacity() - self.submissions.capacity(),
        }
    }
}

/// The queued appends of a stream.
#[derive(Default)]
struct StreamQueue {
    waiting: VecDeque<PendingAppend>,
    /// Whether a transaction with this stream is in flight; new appends wait for its end.
    in_flight: bool,
}

/// A finished transaction: its submissions and the store's results.
type Finished = (Vec<Vec<PendingAppend>>, Vec<Result<Appended, AppendError>>);

struct Committer {
    store: Arc<dyn EventStore>,
    /// Maximum number of transactions in flight.
    concurrency: usize,
    counters: Arc<Counters>,
    metrics: Metrics,
    /// Streams with an append queued or in flight; empty entries are removed.
    streams: HashMap<StreamId, StreamQueue>,
    /// Streams with an append queued and none in flight, oldest first.
    ready: VecDeque<StreamId>,
    /// Number of submissions in `streams`; limits the intake from the channel.
    waiting: usize,
    /// Transactions in flight, polled by this task.
    ///
    /// A task of its own would cost a scheduler hop there and back. After three such hops in a row,
    /// tokio wakes another thread, which takes longer than all other work for an append.
    running: FuturesUnordered<BoxFuture<'static, Finished>>,
    /// Remaining `yield_now` calls, of [`TURNS`].
    turns: usize,
    /// Number of queued appends that ends the yields early: as many as were answered are back.
    expected: usize,
}

impl Committer {
    async fn run(mut self, mut submissions: mpsc::Receiver<PendingAppend>) {
        let mut open = true;
        while open || self.waiting > 0 || !self.running.is_empty() {
            if self.turns == 0 || self.waiting >= self.expected {
                self.turns = 0;
                while self.running.len() < self.concurrency && !self.ready.is_empty() {
                    self.start_transaction();
                }
            }
            tokio::select! {
                submission = submissions.recv(), if open && self.waiting < QUEUE => match submission {
                    Some(submission) => {
                        self.enqueue(submission);
                        self.take_up(&mut submissions);
                    }
                    None => open = false,
                },
                Some(finished) = self.running.next() => {
                    self.take_up(&mut submissions);
                    let answered = self.finish_all(finished).await;
                    (self.turns, self.expected) = (TURNS, self.waiting + answered);
                }
                () = tokio::task::yield_now(), if self.turns > 0 => {
                    self.turns -= 1;
                    self.take_up(&mut submissions);
                }
                // The queued appends were just refused, and the channel is closed.
                else => {}
            }
        }
    }

    /// Finishes transactions; returns the number of their appends.
    ///
    /// A next one without a rival starts before the answers: the disk works while callers go on.
    async fn finish_all(&mut self, finished: Finished) -> usize {
        let (mut answered, mut next) = (0, Some(finished));
        while let Some((batch, answers)) = next.take() {
            if self.concurrency == 1 && !self.ready.is_empty() {
                self.start_transaction();
                if let Poll::Ready(finished) = futures_util::poll!(self.running.next()) {
                    next = finished;
                }
            }
            answered += batch.iter().map(Vec::len).sum::<usize>();
            self.finish(batch, answers);
        }
        answered
    }

    /// Moves all submissions of the channel into the queues, so that they share a transaction.
    fn take_up(&mut self, submissions: &mut mpsc::Receiver<PendingAppend>) {
        while self.waiting < QUEUE
            && let Ok(submission) = submissions.try_recv()
        {
            self.enqueue(submission);
        }
    }

    fn enqueue(&mut self, submission: PendingAppend) {
        let queue = self.streams.entry(submission.stream.clone()).or_default();
        if queue.waiting.is_empty() && !queue.in_flight {
            self.ready.push_back(submission.stream.clone());
        }
        queue.waiting.push_back(submission);
        self.waiting += 1;
    }

    fn start_transaction(&mut self) {
        let (mut appends, mut events, mut bytes) = (0, 0, 0);
        let mut limit = usize::MAX;
        let mut batch: Vec<Vec<PendingAppend>> = Vec::new();
        while let Some(stream) = self.ready.front() {
            let Some(queue) = self.streams.get_mut(stream) else {
                self.ready.pop_front();
                continue;
            };
            let mut taken: Vec<PendingAppend> = Vec::new();
            while let Some(next) = queue.waiting.front() {
                if !next.chain.holds() {
                    let Some(refused) = queue.waiting.pop_front() else { break };
                    self.waiting -= 1;
                    refuse(refused, &self.counters);
                    continue;
                }
                let (size, length) = (next.bytes(), next.events.len());
                let fits = events + length <= BATCH_EVENTS
                    && bytes + size <= BATCH_BYTES
                    && appends < limit.min(next.batch_limit);
                let first = appends == 0;
                // Only an append decided on the previous one can be merged with it.
                let continues = taken
                    .last()
                    .is_none_or(|last| last.expected.plus(last.events.len() as u64) == next.expected);
                if !(fits || first) || !continues {
                    break;
                }
                limit = limit.min(next.batch_limit);
                appends += 1;
                events += length;
                bytes += size;
                taken.extend(queue.waiting.pop_front());
                self.waiting -= 1;
            }
            if taken.is_empty() {
                if queue.waiting.is_empty() {
                    self.ready.pop_front().map(|stream| self.streams.remove(&stream));
                    continue;
                }
                break; // The transaction is full.
            }
            queue.in_flight = true;
            self.ready.pop_front();
            batch.push(taken);
        }
        if !batch.is_empty() {
            self.counters.transactions.fetch_add(1, Ordering::Relaxed);
            self.running.push(append_all(self.store.clone(), batch, self.metrics.clone()).boxed());
        }
    }

    fn finish(&mut self, batch: Vec<Vec<PendingAppend>>, answers: Vec<Result<Appended, AppendError>>) {
        let refused = |answer: &_| matches!(answer, Err(AppendError::Store(StoreError::Invalid { .. })));
        // One of these cannot be stored; the others must not fail with it.
        let suspects = batch.iter().zip(&answers).filter(|(_, answer)| refused(answer));
        let suspects: usize = suspects.map(|(submissions, _)| submissions.len()).sum();
        if suspects > 1 {
            tracing::warn!(appends = suspects, "the event store refused a batch; appending it in halves");
        }
        for (submissions, answer) in batch.into_iter().zip(answers) {
            let Some(stream) = submissions.first().map(|first| first.stream.clone()) else { continue };
            if suspects > 1 && refused(&answer) {
                let queue = self.streams.entry(stream.clone()).or_default();
                for mut submission in submissions.into_iter().rev() {
                    submission.batch_limit = suspects / 2;
                    queue.waiting.push_front(submission);
                    self.waiting += 1;
                }
            } else {
                self.answer(submissions, answer);
            }
            let Some(queue) = self.streams.get_mut(&stream) else { continue };
            queue.in_flight = false;
            if queue.waiting.is_empty() {
                self.streams.remove(&stream);
            } else {
                self.ready.push_back(stream);
            }
        }
    }

    fn answer(&self, submissions: Vec<PendingAppend>, answer: Result<Appended, AppendError>) {
        match answer {
            Ok(appended) => {
                let reason = "the store returned no position for an appended event";
                let missing = || StoreError::Corrupt { reason: reason.into() };
                let mut end = 0;
                for submission in submissions {
                    end += submission.events.len();
                    self.counters.appends.fetch_add(1, Ordering::Relaxed);
                    self.counters.events.fetch_add(submission.events.len() as u64, Ordering::Relaxed);
                    let position = appended.positions.get(end - 1).copied().ok_or_else(|| missing().into());
                    (submission.done)(position.map(|position| Committed { position }));
                }
            }
            Err(error) => {
                let counter = match &error {
                    AppendError::Conflict(_) => &self.counters.conflicts,
                    AppendError::Store(_) => &self.counters.failures,
                };
                // First cut the chains, so that nothing of them is taken up between the answers.
                for submission in &submissions {
                    submission.chain.cut();
                }
                for submission in submissions {
                    counter.fetch_add(1, Ordering::Relaxed);
                    (submission.done)(Err(error.clone()));
                }
            }
        }
    }
}

/// Answers an append whose chain was cut before the append was sent.
fn refuse(submission: PendingAppend, counters: &Counters) {
    counters.conflicts.fetch_add(1, Ordering::Relaxed);
    let conflict = super::Conflict {
        stream: submission.stream,
        expected: ExpectedVersion::Exact(submission.expected),
        actual: None,
    };
    (submission.done)(Err(conflict.into()));
}

async fn append_all(
    store: Arc<dyn EventStore>,
    batch: Vec<Vec<PendingAppend>>,
    metrics: Metrics,
) -> Finished {
    let mut appends = Vec::with_capacity(batch.len());
    for submissions in &batch {
        let Some(first) = submissions.first() else { continue };
        let events = submissions.iter().flat_map(|submission| submission.events.iter().cloned()).collect();
        appends.push(Append::one(first.stream.clone(), ExpectedVersion::Exact(first.expected), events));
    }
    let (expected, events) =
        (appends.len(), batch.iter().flatten().map(|submission| submission.events.len()).sum());
    let timer = Timer::start();
    let answers = match AssertUnwindSafe(async { store.append(appends).await }).catch_unwind().await {
        Ok(answers) if answers.len() == expected => answers,
        Ok(answers) => {
            let found = answers.len();
            failed(expected, format!("the back end returned {found} results for {expected} appends"))
        }
        Err(panic) => failed(expected, format!("the back end panicked: {}", panic_text(&*panic))),
    };
    // Conflicts concern single streams; a failure of the store concerns all appends.
    let failed = answers.iter().find_map(|answer| match answer {
        Err(AppendError::Store(error)) => Some(error.kind()),
        _ => None,
    });
    metrics.appended(timer, events, failed);
    (batch, answers)
}

fn failed(appends: usize, reason: String) -> Vec<Result<Appended, AppendError>> {
    vec![Err(StoreError::OutcomeUnknown { reason, source: None }.into()); appends]
}
