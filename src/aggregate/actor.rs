//! The actor of one aggregate: folds, decides on speculative state, replies when durable.

mod message;
mod pending;
mod receipts;
mod shared;
mod snapshots;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::time::Instant;

pub(crate) use self::message::CommandRequest;
pub(super) use self::message::{AggregateMessage, InFlightGuard};
use self::message::{CommandResult, answer};
use self::pending::{Pending, PendingOutcome};
use self::receipts::{conclude, receipt};
pub(crate) use self::shared::Shared;
use self::snapshots::{stage_snapshot, take_snapshot};
use super::encoding::{DecidedCommand, EncodedDecision};
use super::fold::{FoldError, HydratedState, RecentCommands, Recollection};
use super::repeated::repeat;
use super::{Aggregate, Context, ExecuteError, NotExecutedKind};
use crate::event::{Event, NewEvent, StreamId, Version};
use crate::panic::panic_text;
use crate::store::{AppendError, AppendResult, CommandEvents, PendingAppend, SpeculationChain};

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

impl<A: Aggregate> AggregateState<A> {
    /// Adds a repetition of a pending command to that command; returns any other command.
    fn join_pending(
        &mut self,
        order: Box<CommandRequest<A>>,
        load: InFlightGuard,
    ) -> Option<(Box<CommandRequest<A>>, InFlightGuard)> {
        let Some(pending) = self.pending.iter_mut().find(|pending| {
            pending.order.command_id == order.command_id
                && matches!(pending.decided, PendingOutcome::Events { .. })
        }) else {
            return Some((order, load));
        };
        if pending.order.content == order.content {
            pending.repeated.push((order, load));
        } else {
            let command_id = order.command_id;
            answer(order.reply, Err(NotExecutedKind::CommandIdReused { command_id }.into()));
        }
        None
    }
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
        order: Box<CommandRequest<A>>,
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
        let Some((mut order, load)) = state.join_pending(order, load) else { return };
        let fresh = state.folded.is_none();
        let folded = match self.hydrate(&mut state.folded, &mut state.staged).await {
            Ok(folded) => folded,
            Err(error) => return answer(order.reply, Err(error.into_execute(&self.stream))),
        };
        if let Some(repeated) = self.find_repeated(&order, &folded.commands).await {
            return answer(order.reply, repeated);
        }
        // Check the attempts after the duplicate look-up: a competing append may be this very
        // command on another node.
        if order.attempts >= self.shared.options.attempts {
            let (stream, attempts) = (self.stream.clone(), order.attempts);
            return answer(order.reply, Err(NotExecutedKind::RetriesExhausted { stream, attempts }.into()));
        }
        let expected = folded.version;
        let (decided, events) = match self.decide_and_fold(&mut order, folded) {
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
                return conclude(pending, &self.stream, folded);
            }
            // An append would detect a newer event of another node. An answer without an append
            // must read the stream.
            match Box::pin(folded.catch_up(&*self.shared.store, &self.stream)).await {
                Ok(()) if folded.version == expected => conclude(pending, &self.stream, folded),
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
        self.submit(myself, expected, events, state).await;
    }

    /// Returns the hydrated state. Loads it if there is none.
    async fn hydrate<'s>(
        &self,
        folded: &'s mut Option<HydratedState<A>>,
        staged: &mut Option<(Version, Vec<u8>)>,
    ) -> Result<&'s mut HydratedState<A>, FoldError> {
        match folded {
            Some(folded) => Ok(folded),
            none => {
                let loaded =
                    Box::pin(HydratedState::load(&*self.shared.store, &self.stream, &self.shared.options))
                        .await?;
                let folded = none.insert(loaded);
                // A snapshot now keeps the next fold of a long stream short.
                stage_snapshot(&self.shared.options, staged, folded);
                take_snapshot(&self.shared, &self.stream, folded, staged);
                Ok(folded)
            }
        }
    }

    /// Returns the answer to a command that is already durable; `None` for a new command.
    async fn find_repeated(
        &self,
        order: &CommandRequest<A>,
        commands: &RecentCommands,
    ) -> Option<CommandResult<A>> {
        let events = match commands.find(order.command_id) {
            Recollection::Known(events) => events,
            Recollection::New => return None,
            // I8: if another node appends the command after this look-up, the append gets a version
            // conflict, and the look-up runs again.
            Recollection::Uncertain => {
                match self.shared.store.command_events(&self.stream, order.command_id).await {
                    Ok(found) => found?,
                    Err(error) => return Some(Err(NotExecutedKind::Store(error).into())),
                }
            }
        };
        let (store, id, content) = (&*self.shared.store, order.command_id, order.content);
        Some(Box::pin(repeat(store, &self.stream, id, content, events)).await)
    }

    /// Decides the command and folds the events of the decision into the speculative state.
    #[allow(clippy::type_complexity, reason = "two parts with two destinations")]
    fn decide_and_fold(
        &self,
        order: &mut CommandRequest<A>,
        folded: &mut HydratedState<A>,
    ) -> Result<(PendingOutcome<A>, Vec<NewEvent>), ExecuteError<A::Error>> {
        // The decision is based on all earlier decisions, durable or not: all are in the state.
        order.attempts += 1;
        if order.attempts > 1 {
            self.shared.writer.metrics().command_retried(A::Event::CATEGORY);
        }
        let decision = catch_unwind(AssertUnwindSafe(|| self.decide(order, folded)));
        let (decided, events, read) = decision.unwrap_or_else(|panic| {
            Err(NotExecutedKind::Panicked { stream: self.stream.clone(), message: panic_text(&*panic) }
                .into())
        })?;
        // Fold before the append: events that the state cannot fold must not become durable.
        folded.fold(read.iter()).map_err(|error| error.into_execute(&self.stream))?;
        Ok((decided, events))
    }

    /// Submits the append of the newest pending command to the writer.
    async fn submit(
        &self,
        myself: &ActorRef<AggregateMessage<A>>,
        expected: Version,
        events: Vec<NewEvent>,
        state: &mut AggregateState<A>,
    ) {
        let actor = myself.clone();
        let submission = PendingAppend {
            stream: self.stream.clone(),
            expected,
            events,
            chain: state.chain.clone(),
            batch_limit: usize::MAX,
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
    ) -> Result<(PendingOutcome<A>, Vec<NewEvent>, Vec<A::Event>), ExecuteError<A::Error>> {
        let version = folded.version;
        let without_events =
            |result| Ok((PendingOutcome::Answer { version, result }, Vec::new(), Vec::new()));
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
        let (types, codec) = (&self.shared.types, self.shared.store.info().codec);
        let (id, content, metadata) = (order.command_id, order.content, &order.metadata);
        let command = DecidedCommand { id, content, metadata };
        let EncodedDecision { events, read, reply } = EncodedDecision::new(types, codec, &command, decision)?;
        let last = version.plus(events.len() as u64);
        Ok((PendingOutcome::Events { first: version.next(), last, reply }, events, read))
    }

    /// Handles the writer's answer to the oldest append.
    fn written(&self, result: AppendResult, state: &mut AggregateState<A>) {
        // No entry without events is in front of the append: the preceding append settled them.
        let Some(pending) = state.pending.pop_front() else { return };
        match result {
            Ok(written) => {
                let PendingOutcome::Events { first, last, .. } = &pending.decided else { return };
                let (id, first, last) = (pending.order.command_id, *first, *last);
                if let Some(folded) = &mut state.folded {
                    folded.durable(id, first, last, written.position);
                    if state.staged.as_ref().is_some_and(|(version, _)| *version == last) {
                        take_snapshot(&self.shared, &self.stream, folded, &mut state.staged);
                    }
                }
                receipt(pending, &self.stream, CommandEvents { first, last, position: written.position });
            }
            Err(AppendError::Conflict(_) | AppendError::Changed { .. } | AppendError::Exists { .. }) => {
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
        while let Some(Pending { decided: PendingOutcome::Answer { .. }, .. }) = state.pending.front() {
            let Some(next) = state.pending.pop_front() else { break };
            match &state.folded {
                Some(folded) if !state.broken => conclude(next, &self.stream, folded),
                _ => state.retry_queue.push_back((next.order, next.load)),
            }
        }
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
}
