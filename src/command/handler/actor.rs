//! The actor of a handler: it schedules commands on worker slots.
//!
//! The actor never awaits. Tasks run the attempts.

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use ractor::concurrency::OneshotSender;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use super::Handler;
use super::caller::Caller;
use super::job::{AttemptResult, Shared};
use super::message::{Message, WorkerPermit};
use super::run::run;
use crate::command::NotExecutedKind;
use crate::command::target::{RoutedCommand, ToHandler};
use crate::panic::{panic_text, text_of};

/// A queued or running command. It outlives its callers, and a repetition joins it.
pub(crate) struct Current<H: Handler> {
    fingerprint: u128,
    /// Time at which the last caller stops waiting.
    deadline: Instant,
    callers: Vec<Caller<H>>,
    /// Permit of the attempt within the handler's limit, independent of its callers.
    ///
    /// The first caller shares it.
    _permit: Arc<OwnedSemaphorePermit>,
}

pub(crate) struct HandlerActor<H>(pub(super) Arc<Shared<H>>);

pub(crate) struct HandlerState<H: Handler> {
    /// Number of free worker slots.
    free: usize,
    /// Attempts that need a slot again. They go first, so that started commands finish.
    resuming: VecDeque<OneshotSender<WorkerPermit<H>>>,
    /// Commands that wait for a worker, in order.
    ready: VecDeque<RoutedCommand<ToHandler<H>>>,
    /// Commands that wait for others with the same key, in order.
    ///
    /// Every key with a ready or running command has an entry.
    turns: HashMap<String, VecDeque<RoutedCommand<ToHandler<H>>>>,
    /// Queued and running commands.
    current: HashMap<Uuid, Current<H>>,
    /// Tasks of the attempts. They end with the actor.
    attempts: JoinSet<()>,
}

impl<H: Handler> Actor for HandlerActor<H> {
    type Msg = Message<H>;
    type State = HandlerState<H>;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Self::Msg>, (): ()) -> Result<Self::State, ActorProcessingErr> {
        Ok(HandlerState {
            free: self.0.options.workers,
            resuming: VecDeque::new(),
            ready: VecDeque::new(),
            turns: HashMap::new(),
            current: HashMap::new(),
            attempts: JoinSet::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Run(job, caller, permit) => state.take(job, caller, permit),
            Message::Ended { id, key, ran, freed } => {
                state.free += usize::from(freed);
                state.end(id, key, &ran);
            }
            Message::Freed => state.free += 1,
            Message::Enter(sender) => state.resuming.push_back(sender),
        }
        // Remove the results of ended attempts from the set.
        while state.attempts.try_join_next().is_some() {}
        self.work(&myself, state);
        Ok(())
    }
}

impl<H: Handler> HandlerActor<H> {
    /// Assigns the free worker slots.
    fn work(&self, myself: &ActorRef<Message<H>>, state: &mut HandlerState<H>) {
        while state.free > 0 {
            if let Some(resuming) = state.resuming.pop_front() {
                state.free -= 1;
                // If the attempt no longer waits, the send drops the slot, which frees it.
                let _ = resuming.send(WorkerPermit::new(myself.clone()));
                continue;
            }
            let Some(job) = state.ready.pop_front() else { return };
            if state.current.get(&job.id).is_some_and(|current| current.deadline <= Instant::now()) {
                let reason = "dropped because it did not start before its deadline".to_owned();
                state.end(job.id, job.key, &AttemptResult::Unknown(reason));
                continue;
            }
            state.free -= 1;
            let (id, key) = (job.id, job.key.clone());
            let (shared, worker, actor) = (self.0.clone(), WorkerPermit::new(myself.clone()), myself.clone());
            state.attempts.spawn(async move {
                // Hooks and encoders are user code too, beside the handler itself.
                let ran = AssertUnwindSafe(run(shared, job, worker)).catch_unwind().await;
                let (ran, freed) = ran.unwrap_or_else(|panic| {
                    let reason = format!("user code around the handler panicked: {}", panic_text(&*panic));
                    (AttemptResult::Unknown(reason), false)
                });
                // A failed cast means that the actor has ended together with its callers' ports.
                let _ = actor.cast(Message::Ended { id, key, ran, freed });
            });
        }
    }
}

impl<H: Handler> HandlerState<H> {
    fn take(
        &mut self,
        job: RoutedCommand<ToHandler<H>>,
        caller: Caller<H>,
        permit: Arc<OwnedSemaphorePermit>,
    ) {
        if let Some(current) = self.current.get_mut(&job.id) {
            if current.fingerprint != job.fingerprint {
                // A failed send means that the caller has stopped waiting.
                let _ = caller.answer(Err(NotExecutedKind::CommandIdReused { command_id: job.id }.into()));
                return;
            }
            current.deadline = current.deadline.max(job.deadline);
            // Keep only callers that still wait, so that repetitions of a running command do not
            // accumulate.
            current.callers.retain(|caller| !caller.reply.is_closed());
            return current.callers.push(caller);
        }
        let (fingerprint, deadline) = (job.fingerprint, job.deadline);
        let current = Current { fingerprint, deadline, callers: vec![caller], _permit: permit };
        self.current.insert(job.id, current);
        match &job.key {
            None => self.ready.push_back(job),
            Some(key) => match self.turns.get_mut(key) {
                Some(others) => others.push_back(job),
                None => {
                    self.turns.insert(key.clone(), VecDeque::new());
                    self.ready.push_back(job);
                }
            },
        }
    }

    /// Answers all callers of a command, and makes the next command with its key ready.
    fn end(&mut self, id: Uuid, key: Option<String>, ran: &AttemptResult) {
        let callers = self.current.remove(&id).map(|current| current.callers).unwrap_or_default();
        for (count, caller) in callers.into_iter().enumerate() {
            let answer = ran.answer::<H>(id, count > 0);
            if let Err(Err(error)) = caller.answer(answer) {
                let error = text_of(&error);
                tracing::warn!(handler = H::NAME, command = %id, error, "command failed after its caller stopped waiting");
            }
        }
        if let Some(key) = key {
            match self.turns.get_mut(&key).and_then(VecDeque::pop_front) {
                Some(next) => self.ready.push_back(next),
                None => _ = self.turns.remove(&key),
            }
        }
    }
}
