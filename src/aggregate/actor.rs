//! The actor of one aggregate: folds, decides on speculative state, replies when durable.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chrono::{DateTime, Utc};
use ractor::{Actor, ActorProcessingErr, ActorRef, MessagingErr, RpcReplyPort};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use uuid::Uuid;

use super::fold::{HydratedState, Recollection};
use super::options::AggregateOptions;
use super::{Aggregate, Context, ExecuteError, NotExecutedKind, Receipt};
use crate::codec::{from_cbor, to_cbor};
use crate::event::{EncodeError, Event, EventTypes, Metadata, NewEvent, StreamId, Version};
use crate::panic::{panic_text, text_of};
use crate::store::{
    AppendError, AppendResult, CommandEvents, EventStore, ExpectedVersion, GroupCommitter, PendingAppend,
    SpeculationChain,
};
use crate::telemetry::trace::CommandSpan;

/// CBOR's null: a reply without content (`()`). It is not stored.
const NO_REPLY: [u8; 1] = [0xf6];

/// A receipt, or the error of a command without one.
pub(crate) type CommandResult<A> =
    Result<Receipt<<A as Aggregate>::Reply>, ExecuteError<<A as Aggregate>::Error>>;

/// A command request, with everything that a further attempt needs.
pub(crate) struct CommandRequest<A: Aggregate> {
    pub(crate) command: A::Command,
    pub(crate) command_id: Uuid,
    /// Fingerprint of the content. It detects the reuse of an id for another command.
    pub(crate) content: u64,
    pub(crate) metadata: Metadata,
    /// Version of the aggregate that the caller expects.
    pub(crate) expected: ExpectedVersion,
    /// Time until which the caller waits. An undecided command is then dropped for good.
    pub(crate) deadline: Instant,
    /// Arrival time. It is the clock of the decisions.
    pub(crate) now: DateTime<Utc>,
    /// Number of decisions so far.
    pub(crate) attempts: u32,
    pub(crate) span: CommandSpan,
    /// Permit within the router's limit of commands in flight. The answer releases it.
    pub(crate) _permit: OwnedSemaphorePermit,
    pub(crate) reply: RpcReplyPort<CommandResult<A>>,
}

/// A guard that counts a command as in flight for its aggregate. The answer drops it.
///
/// An aggregate without guards has no queued commands and no speculative state. It can be evicted
/// without loss.
pub(super) struct InFlightGuard(Arc<AtomicUsize>);

impl InFlightGuard {
    pub(super) fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter.clone())
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// The shared state of all actors of one kind of aggregate.
pub(super) struct Shared<A: Aggregate> {
    pub(super) store: Arc<dyn EventStore>,
    pub(super) writer: GroupCommitter,
    pub(super) options: AggregateOptions<A>,
    pub(super) types: Arc<EventTypes>,
    /// Permits for snapshot writes.
    pub(super) snapshots: Arc<Semaphore>,
}

pub(super) enum AggregateMessage<A: Aggregate> {
    /// Decide on a command. `InFlightGuard` counts it as in flight until it is dropped.
    Execute(Box<CommandRequest<A>>, InFlightGuard),
    /// The writer answered the oldest append of this actor.
    Committed(AppendResult),
}

pub(super) struct AggregateActor<A: Aggregate> {
    pub(super) shared: Arc<Shared<A>>,
    pub(super) stream: StreamId,
}

pub(super) struct AggregateState<A: Aggregate> {
    /// Hydrated state, including the speculative events of `pending`.
    ///
    /// `None` before the first command and after a failure that invalidated the state. The next
    /// decision then folds the stream.
    folded: Option<HydratedState<A>>,
    /// Decided commands without an answer, in order. The writer has their appends.
    pending: VecDeque<Pending<A>>,
    /// Link between the appends in `pending`: if one fails, the writer rejects the rest.
    chain: SpeculationChain,
    /// Whether an append in `pending` failed or user code panicked.
    ///
    /// The actor decides no command until the remaining appends are answered.
    broken: bool,
    /// Commands to decide again, because their speculative state was wrong.
    retry_queue: VecDeque<(Box<CommandRequest<A>>, InFlightGuard)>,
    /// Commands that arrived while `broken`. The actor decides them after `retry_queue`.
    backlog: VecDeque<(Box<CommandRequest<A>>, InFlightGuard)>,
    /// Encoded state that waits until its version is durable.
    staged: Option<(Version, Vec<u8>)>,
}

/// Maximum number of concurrent snapshot writes for one kind of aggregate.
///
/// The actor skips further ones.
pub(super) const SNAPSHOTS_UNDER_WAY: usize = 4;

/// A decided command without an answer.
struct Pending<A: Aggregate> {
    order: Box<CommandRequest<A>>,
    load: InFlightGuard,
    decided: Decided<A>,
    /// Span from the decision to the end of the append.
    _append: Option<Box<tracing::Span>>,
    /// Repetitions of the command that arrived meanwhile. They get the same answer.
    repeated: Vec<(Box<CommandRequest<A>>, InFlightGuard)>,
}

enum Decided<A: Aggregate> {
    /// Events that are folded into the state and whose append is in flight.
    Events { first: Version, last: Version, reply: A::Reply },
    /// No events.
    ///
    /// The answer waits until all events up to `version`, the base of the decision, are durable.
    Answer { version: Version, result: Result<A::Reply, ExecuteError<A::Error>> },
}

impl<A: Aggregate> Actor for AggregateActor<A> {
    type Msg = AggregateMessage<A>;
    type State = AggregateState<A>;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Self::Msg>, (): ()) -> Result<Self::State, ActorProcessingErr> {
        Ok(AggregateState {
            folded: None,
            pending: VecDeque::new(),
            chain: SpeculationChain::new(),
            broken: false,
            retry_queue: VecDeque::new(),
            backlog: VecDeque::new(),
            staged: None,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            AggregateMessage::Execute(order, load) if state.broken => state.backlog.push_back((order, load)),
            AggregateMessage::Execute(order, load) => self.execute(&myself, order, load, state).await,
            AggregateMessage::Committed(outcome) => self.written(outcome, state),
        }
        // Also check after `execute`: after a panic with no append in flight, no further message
        // triggers the recovery.
        while state.broken && state.pending.is_empty() {
            Box::pin(self.recover_after_conflict(&myself, state)).await;
        }
        Ok(())
    }
}

impl<A: Aggregate> AggregateActor<A> {
    async fn execute(
        &self,
        myself: &ActorRef<AggregateMessage<A>>,
        mut order: Box<CommandRequest<A>>,
        load: InFlightGuard,
        state: &mut AggregateState<A>,
    ) {
        if order.deadline <= Instant::now() {
            let reason = "dropped because it was not decided before its deadline".to_owned();
            return answer(
                order.reply,
                Err(ExecuteError::OutcomeUnknown { command_id: order.command_id, reason }),
            );
        }
        if let Some(pending) = state.pending.iter_mut().find(|pending| {
            pending.order.command_id == order.command_id && matches!(pending.decided, Decided::Events { .. })
        }) {
            if pending.order.content != order.content {
                let command_id = order.command_id;
                return answer(order.reply, Err(NotExecutedKind::CommandIdReused { command_id }.into()));
            }
            return pending.repeated.push((order, load));
        }
        let fresh = state.folded.is_none();
        let folded = match &mut state.folded {
            Some(folded) => folded,
            none => {
                match Box::pin(HydratedState::load(&*self.shared.store, &self.stream, &self.shared.options))
                    .await
                {
                    Ok(loaded) => {
                        let folded = none.insert(loaded);
                        // A snapshot now keeps the next fold of a long stream short.
                        stage_snapshot(&self.shared.options, &mut state.staged, folded);
                        self.take_snapshot(folded, &mut state.staged);
                        folded
                    }
                    Err(error) => return answer(order.reply, Err(error.into_execute(&self.stream))),
                }
            }
        };
        let earlier = match folded.commands.find(order.command_id) {
            Recollection::Known(events) => Some(events),
            Recollection::New => None,
            // I8: if another node appends the command after this look-up, the append gets a version
            // conflict, and the look-up runs again.
            Recollection::Uncertain => {
                match self.shared.store.command_events(&self.stream, order.command_id).await {
                    Ok(found) => found,
                    Err(error) => return answer(order.reply, Err(NotExecutedKind::Store(error).into())),
                }
            }
        };
        if let Some(events) = earlier {
            let repeated = Box::pin(self.repeat(&order, events)).await;
            return answer(order.reply, repeated);
        }
        // Check the attempts after the duplicate look-up: a competing append may be this very
        // command on another node.
        if order.attempts >= self.shared.options.attempts {
            let (stream, attempts) = (self.stream.clone(), order.attempts);
            return answer(order.reply, Err(NotExecutedKind::RetriesExhausted { stream, attempts }.into()));
        }
        // The decision is based on all earlier decisions, durable or not: all are in the state.
        order.attempts += 1;
        if order.attempts > 1 {
            self.shared.writer.metrics().decided_again(A::Event::CATEGORY);
        }
        let decision =
            catch_unwind(AssertUnwindSafe(|| self.decide(&order, folded))).unwrap_or_else(|panic| {
                Err(NotExecutedKind::Panicked { stream: self.stream.clone(), message: panic_text(&*panic) }
                    .into())
            });
        let expected = folded.version;
        // Fold before the append: events that the state cannot fold must not become durable.
        let decision = decision.and_then(|(decided, events, read)| {
            folded.fold(read.iter()).map_err(|error| error.into_execute(&self.stream))?;
            Ok((decided, events))
        });
        let (decided, events) = match decision {
            Ok(decided) => decided,
            // User code caused the error, whether or not the speculative events become durable.
            Err(error) => {
                if matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::Panicked { .. }, .. }) {
                    state.folded = None;
                    state.broken = true;
                }
                return answer(order.reply, Err(error));
            }
        };
        if !events.is_empty() {
            stage_snapshot(&self.shared.options, &mut state.staged, folded);
        }
        let _append = order.span.append(events.len());
        let pending = Pending { order, load, decided, _append, repeated: Vec::new() };
        if events.is_empty() {
            if !state.pending.is_empty() {
                return state.pending.push_back(pending);
            }
            if fresh {
                return self.settle(pending, folded);
            }
            // An append would detect a newer event of another node. An answer without an append
            // must read the stream.
            match Box::pin(folded.catch_up(&*self.shared.store, &self.stream)).await {
                Ok(()) if folded.version == expected => self.settle(pending, folded),
                Ok(()) => {
                    let Pending { order, load, .. } = pending;
                    Box::pin(self.execute(myself, order, load, state)).await;
                }
                Err(error) => {
                    state.folded = None;
                    answer(pending.order.reply, Err(error.into_execute(&self.stream)));
                }
            }
            return;
        }
        state.pending.push_back(pending);
        let actor = myself.clone();
        let submission = PendingAppend {
            stream: self.stream.clone(),
            expected,
            events,
            chain: state.chain.clone(),
            alone: false,
            done: Box::new(move |outcome| {
                // A failed cast means that a shutdown has killed the actor. Its callers have
                // their answers.
                let _ = actor.cast(AggregateMessage::Committed(outcome));
            }),
        };
        if self.shared.writer.submit(submission).await.is_err()
            && let Some(pending) = state.pending.pop_back()
        {
            answer(pending.order.reply, Err(NotExecutedKind::ShuttingDown.into()));
        }
    }

    /// Calls the aggregate's `handle` and encodes the decision.
    ///
    /// Also returns the events in the form that a reader will decode.
    ///
    /// # Panics
    /// If user code panics.
    #[allow(clippy::type_complexity, reason = "three parts with three destinations")]
    fn decide(
        &self,
        order: &CommandRequest<A>,
        folded: &HydratedState<A>,
    ) -> Result<(Decided<A>, Vec<NewEvent>, Vec<A::Event>), ExecuteError<A::Error>> {
        let version = folded.version;
        let without_events = |result| Ok((Decided::Answer { version, result }, Vec::new(), Vec::new()));
        if !order.expected.allows(version) {
            return without_events(Err(NotExecutedKind::ExpectedVersion {
                stream: self.stream.clone(),
                expected: order.expected,
                actual: version,
            }
            .into()));
        }
        let _span = order.span.decide(order.attempts);
        let context =
            Context::new(&self.stream, folded.version, order.command_id, &order.metadata, order.now);
        let decision = match folded.state.handle(&order.command, &context) {
            Ok(decision) if decision.events.is_empty() => return without_events(Ok(decision.reply)),
            Ok(decision) => decision,
            Err(rejection) => return without_events(Err(ExecuteError::Rejected(rejection))),
        };
        let (encoded, read, reply) = self.encode(order, &decision.events, decision.reply)?;
        let last = version.plus(encoded.len() as u64);
        Ok((Decided::Events { first: version.next(), last, reply }, encoded, read))
    }

    /// Encodes the events and the reply of a decision.
    ///
    /// Returns the events for the store, and the events in the form that a reader will decode. The
    /// reply has the form that a repeated command will get.
    #[allow(clippy::type_complexity, reason = "three parts with three destinations")]
    fn encode(
        &self,
        order: &CommandRequest<A>,
        events: &[A::Event],
        reply: A::Reply,
    ) -> Result<(Vec<NewEvent>, Vec<A::Event>, A::Reply), EncodeError> {
        let codec = self.shared.store.info().codec;
        let metadata = order.metadata.encode()?;
        let (mut encoded, mut read) = (Vec::with_capacity(events.len()), Vec::with_capacity(events.len()));
        for event in events {
            let (name, payload, event) = self.shared.types.encode(event, codec)?;
            read.push(event);
            encoded.push(NewEvent {
                id: Uuid::now_v7(),
                name,
                payload,
                command_id: order.command_id,
                metadata: metadata.clone(),
            });
        }
        let stored = to_cbor(&reply)?;
        let (stored, reply) = if stored == NO_REPLY {
            (Vec::new(), reply)
        } else {
            let again = from_cbor(&stored).map_err(|reason| EncodeError::NotReadable {
                what: format!("the reply {}", std::any::type_name::<A::Reply>()),
                field: "its content".into(),
                reason,
                remedy: "change the reply type so that serde can read the form that it writes",
            })?;
            (stored, again)
        };
        if let Some(last) = encoded.last_mut() {
            let content = Some(order.content);
            last.metadata = Metadata { reply: stored, content, ..order.metadata.clone() }.encode()?;
        }
        Ok((encoded, read, reply))
    }

    /// Handles the writer's answer to the oldest append.
    fn written(&self, result: AppendResult, state: &mut AggregateState<A>) {
        // No entry without events is in front of the append: the preceding append settled them.
        let Some(pending) = state.pending.pop_front() else { return };
        match result {
            Ok(written) => {
                let Decided::Events { first, last, .. } = &pending.decided else { return };
                let (id, first, last) = (pending.order.command_id, *first, *last);
                if let Some(folded) = &mut state.folded {
                    folded.durable(id, first, last, written.position);
                    if state.staged.as_ref().is_some_and(|(version, _)| *version == last) {
                        self.take_snapshot(folded, &mut state.staged);
                    }
                }
                self.receipt(pending, CommandEvents { first, last, position: written.position });
            }
            Err(AppendError::Conflict(_)) => {
                state.broken = true;
                state.retry_queue.push_back((pending.order, pending.load));
                state.retry_queue.extend(pending.repeated);
            }
            Err(AppendError::Store(error)) => {
                state.broken = true;
                for (order, _load) in std::iter::once((pending.order, pending.load)).chain(pending.repeated) {
                    let id = order.command_id;
                    answer(order.reply, Err(ExecuteError::from_store(error.clone(), id)));
                }
            }
        }
        // Entries without events after the append share its fate: they are valid only if the append
        // is durable.
        while let Some(Pending { decided: Decided::Answer { .. }, .. }) = state.pending.front() {
            let Some(next) = state.pending.pop_front() else { break };
            match &state.folded {
                Some(folded) if !state.broken => self.settle(next, folded),
                _ => state.retry_queue.push_back((next.order, next.load)),
            }
        }
    }

    /// Answers a command that was decided without events on a durable state.
    fn settle(&self, pending: Pending<A>, folded: &HydratedState<A>) {
        let Pending { order, decided, .. } = pending;
        let Decided::Answer { version, result } = decided else { return };
        let result = result.map(|reply| Receipt {
            command_id: order.command_id,
            stream: self.stream.clone(),
            version,
            position: folded.position,
            events: 0,
            reply,
            duplicate: false,
        });
        answer(order.reply, result);
    }

    /// Answers a command whose events are durable, and its repetitions.
    fn receipt(&self, pending: Pending<A>, record: CommandEvents) {
        let Pending { order, decided, repeated, .. } = pending;
        let Decided::Events { reply, .. } = decided else { return };
        if !repeated.is_empty() {
            let copy = to_cbor(&reply).map_err(|error| error.to_string());
            for (order, _load) in repeated {
                let copy = copy.as_ref().map_err(Clone::clone).and_then(|bytes| from_cbor(bytes));
                let receipt =
                    copy.map(|reply| Receipt::repeated(order.command_id, &self.stream, record, reply));
                let unreadable = |reason| {
                    let receipt = Receipt::repeated(order.command_id, &self.stream, record, ());
                    ExecuteError::unreadable_reply(order.command_id, Some(receipt), reason)
                };
                answer(order.reply, receipt.map_err(unreadable));
            }
        }
        let mut receipt = Receipt::repeated(order.command_id, &self.stream, record, reply);
        receipt.duplicate = false;
        answer(order.reply, Ok(receipt));
    }

    /// Rebuilds the first receipt of a durable command from the reply in its last event.
    async fn repeat(&self, order: &CommandRequest<A>, record: CommandEvents) -> CommandResult<A> {
        // I8: the command is durable. From here on, every error is `OutcomeUnknown`, except a
        // different content and an unreadable reply.
        let unknown = |reason| ExecuteError::OutcomeUnknown {
            command_id: order.command_id,
            reason: format!("it took effect, but its first receipt cannot be read: {reason}"),
        };
        // I3: the events may be visible only because the wait for a standby was cancelled. Confirm
        // that they are durable before the answer.
        let durable = self.shared.store.confirm_durable().await;
        durable.map_err(|error| unknown(error.to_string()))?;
        let before = Version::new(record.last.get() - 1);
        let events = self.shared.store.read_stream(&self.stream, before, 1).await;
        let metadata = match events.map_err(|error| unknown(error.to_string()))?.first() {
            Some(event) if event.command_id == order.command_id => {
                event.decode_metadata().map_err(|error| unknown(error.to_string()))?
            }
            // A standby without the event took over, or the store was restored.
            _ => return Err(unknown("its last event is no longer in the log".into())),
        };
        // Events of other programs and of older versions have no fingerprint.
        if metadata.content.is_some_and(|content| content != order.content) {
            return Err(NotExecutedKind::CommandIdReused { command_id: order.command_id }.into());
        }
        let reply = from_cbor(if metadata.reply.is_empty() { &NO_REPLY } else { &metadata.reply });
        // A retry reads the same bytes: the outcome is known, and only the reply is not.
        reply.map(|reply| Receipt::repeated(order.command_id, &self.stream, record, reply)).map_err(
            |reason| {
                let receipt = Receipt::repeated(order.command_id, &self.stream, record, ());
                ExecuteError::unreadable_reply(order.command_id, Some(receipt), reason)
            },
        )
    }

    /// Recovers after a conflict or a panic, once no append is in flight.
    ///
    /// Drops speculative state, reads the newer events of the stream, then decides the queued
    /// commands.
    async fn recover_after_conflict(
        &self,
        myself: &ActorRef<AggregateMessage<A>>,
        state: &mut AggregateState<A>,
    ) {
        state.broken = false;
        state.chain = SpeculationChain::new();
        state.staged = None;
        // Without speculative events, only the events of other writers are missing.
        let clean = state.folded.take().filter(|folded| !folded.speculated());
        if let Some(mut folded) = clean {
            // After an error, the next decision folds the stream and reports the error if it
            // persists.
            if folded.catch_up(&*self.shared.store, &self.stream).await.is_ok() {
                state.folded = Some(folded);
            }
        }
        let mut orders = std::mem::take(&mut state.retry_queue);
        orders.append(&mut state.backlog);
        while let Some((order, load)) = orders.pop_front() {
            if state.broken {
                state.backlog.push_back((order, load));
            } else {
                self.execute(myself, order, load, state).await;
            }
        }
    }

    /// Writes the staged snapshot in a separate task.
    fn take_snapshot(&self, folded: &mut HydratedState<A>, staged: &mut Option<(Version, Vec<u8>)>) {
        let (Some((version, bytes)), Some(snapshots)) = (staged.take(), &self.shared.options.snapshots)
        else {
            return;
        };
        // Also advance after a skipped snapshot. Otherwise every event would encode the state until
        // a permit is free.
        folded.snapshot = version;
        let Ok(place) = self.shared.snapshots.clone().try_acquire_owned() else {
            return tracing::debug!(stream = %self.stream, %version, "skipping a snapshot; other snapshots are being written");
        };
        let (store, stream) = (self.shared.store.clone(), self.stream.clone());
        match folded.pack(version, snapshots.revision, bytes) {
            Ok(snapshot) => {
                tokio::spawn(async move {
                    let _place = place;
                    if let Err(error) = store.save_snapshot(&stream, snapshot).await {
                        tracing::warn!(%stream, %version, %error, "could not save a snapshot; retrying with the next one");
                    }
                });
            }
            Err(error) => tracing::warn!(%stream, %version, %error, "could not encode a snapshot"),
        }
    }
}

/// Encodes the state if a snapshot is due.
///
/// The state may be speculative. The encoded form waits until its version is durable.
fn stage_snapshot<A: Aggregate>(
    options: &AggregateOptions<A>,
    staged: &mut Option<(Version, Vec<u8>)>,
    folded: &mut HydratedState<A>,
) {
    let Some(snapshots) = &options.snapshots else { return };
    if staged.is_some() || folded.version.get() < folded.snapshot.get() + snapshots.every {
        return;
    }
    let encoded = catch_unwind(AssertUnwindSafe(|| (snapshots.encode)(&folded.state)))
        .unwrap_or_else(|panic| Err(panic_text(&*panic)));
    match encoded {
        Ok(bytes) => *staged = Some((folded.version, bytes)),
        Err(error) => {
            tracing::warn!(%error, "could not encode the state of an aggregate; skipping the snapshot");
            // Do not retry with every event.
            folded.snapshot = folded.version;
        }
    }
}

/// Answers a caller. Logs an error that the caller no longer waits for.
fn answer<R, E: std::fmt::Display>(port: RpcReplyPort<Result<R, E>>, answer: Result<R, E>) {
    if let Err(MessagingErr::SendErr(Err(error))) = port.send(answer) {
        let error = text_of(&error);
        tracing::warn!(error, "command failed after its caller stopped waiting");
    }
}
