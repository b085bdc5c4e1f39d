//! The task of a writer.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep};

use super::super::append::{Append, AppendError, ExpectedVersion};
use super::super::{Appended, EventStore, StoreError};
use super::counters::Counters;
use super::pending::{Committed, PendingAppend};
use crate::event::StreamId;
use crate::future::BoxFuture;
use crate::panic::panic_text;
use crate::telemetry::{Metrics, Timer};

/// Maximum number of `yield_now` calls before a transaction, if none was ready after the last one.
///
/// Callers that were just answered submit again after some hops (actor, caller, router, actor).
/// Without a yield for each hop, the first of them gets a transaction alone. Cost: about 1 µs.
const TURNS: usize = 4;

/// Maximum number of events in a small transaction.
///
/// On two processors, PostgreSQL commits a sixth less for 64 callers if a transaction may start beside
/// any other, and a quarter less for two callers if it never may. Up to 8 make little difference.
const SMALL: usize = 4;
/// Time in flight after which a transaction is slow, a multiple of what a fast disk takes.
const SLOW: Duration = Duration::from_millis(1);

/// Maximum number of events in a transaction; a larger append gets a transaction of its own.
const BATCH_EVENTS: usize = 512;
/// Maximum number of payload and metadata bytes in a transaction; likewise.
const BATCH_BYTES: usize = 1 << 20;
/// Maximum number of queued appends; beyond it, submitting waits.
pub(super) const QUEUE: usize = 4_096;

/// The queued appends of a stream.
#[derive(Default)]
struct StreamQueue {
    waiting: VecDeque<PendingAppend>,
    /// Whether a transaction with this stream is in flight; new appends wait for its end.
    in_flight: bool,
}

/// A transaction in flight.
struct InFlight {
    number: u64,
    events: usize,
    since: Instant,
}

/// A finished transaction: its number, its submissions and the store's results.
type Finished = (u64, Vec<Vec<PendingAppend>>, Vec<Result<Appended, AppendError>>);

pub(super) struct Committer {
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
    /// The same transactions, in the order of their starts.
    in_flight: Vec<InFlight>,
    /// Ends when the newest of them is slow.
    newest_is_slow: Pin<Box<Sleep>>,
    /// Number of the next transaction.
    next_number: u64,
    /// Remaining `yield_now` calls, of [`TURNS`].
    turns: usize,
    /// Number of queued appends that ends the yields early: as many as were answered are back.
    expected: usize,
}

impl Committer {
    pub(super) fn new(store: Arc<dyn EventStore>, counters: Arc<Counters>, metrics: Metrics) -> Self {
        Self {
            concurrency: store.info().append_concurrency.max(1),
            store,
            counters,
            metrics,
            streams: HashMap::new(),
            ready: VecDeque::new(),
            waiting: 0,
            running: FuturesUnordered::new(),
            in_flight: Vec::new(),
            newest_is_slow: Box::pin(sleep(SLOW)),
            next_number: 0,
            turns: 0,
            expected: 0,
        }
    }

    pub(super) async fn run(mut self, mut submissions: mpsc::Receiver<PendingAppend>) {
        let mut open = true;
        while open || self.waiting > 0 || !self.running.is_empty() {
            if self.turns == 0 || self.waiting >= self.expected {
                self.turns = 0;
                while self.may_start() {
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
                () = &mut self.newest_is_slow, if self.waits_for_the_newest() => {}
                () = tokio::task::yield_now(), if self.turns > 0 => {
                    self.turns -= 1;
                    self.take_up(&mut submissions);
                }
                // The queued appends were just refused, and the channel is closed.
                else => {}
            }
        }
    }

    /// Returns whether a transaction can start now.
    fn may_start(&self) -> bool {
        let may = |newest: &InFlight| newest.events <= SMALL || newest.since.elapsed() >= SLOW;
        !self.ready.is_empty() && self.in_flight.last().is_none_or(|newest| self.has_room() && may(newest))
    }

    /// Returns whether a transaction can start as soon as the newest one is slow.
    fn waits_for_the_newest(&self) -> bool {
        let waits = !self.ready.is_empty() && !self.in_flight.is_empty();
        waits && self.has_room() && !self.may_start()
    }

    fn has_room(&self) -> bool {
        self.in_flight.len() < self.concurrency
    }

    /// Watches when the newest transaction in flight is slow.
    fn watch_the_newest(&mut self) {
        if self.concurrency > 1
            && let Some(newest) = self.in_flight.last()
        {
            self.newest_is_slow.as_mut().reset(newest.since + SLOW);
        }
    }

    /// Finishes transactions; returns the number of their appends.
    ///
    /// A next one without a rival starts before the answers.
    async fn finish_all(&mut self, finished: Finished) -> usize {
        let (mut answered, mut next) = (0, Some(finished));
        while let Some((number, batch, answers)) = next.take() {
            self.in_flight.retain(|other| other.number != number);
            self.watch_the_newest();
            if self.in_flight.is_empty() && !self.ready.is_empty() {
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
                if !(fits || first) || !continues || !tags_fit(&taken, next) {
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
            let number = self.next_number;
            self.next_number += 1;
            self.in_flight.push(InFlight { number, events, since: Instant::now() });
            self.watch_the_newest();
            self.running.push(append_all(self.store.clone(), number, batch, self.metrics.clone()).boxed());
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
                    AppendError::Store(_) => &self.counters.failures,
                    _ => &self.counters.conflicts,
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
/// Returns whether an append can be merged with those before it: one append has a limited number of
/// tags.
fn tags_fit(taken: &[PendingAppend], next: &PendingAppend) -> bool {
    if taken.is_empty() || next.events.iter().all(|event| event.tags.is_empty()) {
        return true;
    }
    let events = taken.iter().chain([next]).flat_map(|append| &append.events);
    let tags: HashSet<_> = events.flat_map(|event| event.tags.iter()).collect();
    tags.len() <= Append::MAX_TAGS
}

fn refuse(submission: PendingAppend, counters: &Counters) {
    counters.conflicts.fetch_add(1, Ordering::Relaxed);
    let conflict = super::super::Conflict {
        stream: submission.stream,
        expected: ExpectedVersion::Exact(submission.expected),
        actual: None,
    };
    (submission.done)(Err(conflict.into()));
}

async fn append_all(
    store: Arc<dyn EventStore>,
    number: u64,
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
    (number, batch, answers)
}

fn failed(appends: usize, reason: String) -> Vec<Result<Appended, AppendError>> {
    vec![Err(StoreError::OutcomeUnknown { reason, source: None }.into()); appends]
}
