//! The actor of a handler: it schedules commands on worker slots.
//!
//! The actor never awaits. Tasks run the attempts.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use ractor::concurrency::{OneshotSender, oneshot};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, ActorRuntime, SpawnErr};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use super::run::{AttemptResult, run};
use super::{Handled, Handler, HandlerOptions, HandlerStatus};
use crate::aggregate::SHUTDOWN;
use crate::command::bus::Dispatcher;
use crate::command::{ExecuteError, Respawn};
use crate::event::Metadata;
use crate::panic::{panic_text, text_of};
use crate::store::{EventStore, StoreError};
use crate::telemetry::trace::CommandSpan;
use crate::time::after;

/// The answer to a handler's command.
pub(crate) type Answer<H> = Result<Handled<<H as Handler>::Reply>, ExecuteError<<H as Handler>::Error>>;

/// A command for a handler.
pub(crate) struct HandlerJob<H: Handler> {
    pub(crate) command: H::Command,
    pub(crate) id: Uuid,
    pub(crate) metadata: Metadata,
    pub(crate) fingerprint: Uuid,
    pub(crate) key: Option<String>,
    /// Time until which its caller waits.
    ///
    /// A command that has not started by the latest deadline of its callers is dropped.
    pub(crate) deadline: Instant,
    pub(crate) span: CommandSpan,
}

/// A queued or running command. It outlives its callers, and a repetition joins it.
struct Current<H: Handler> {
    fingerprint: Uuid,
    /// Time at which the last caller stops waiting.
    deadline: Instant,
    callers: Vec<Caller<H>>,
    /// Permit of the attempt within the handler's limit, independent of its callers.
    ///
    /// The first caller shares it.
    _permit: Arc<OwnedSemaphorePermit>,
}

/// A caller that waits for the answer to a command.
pub(super) struct Caller<H: Handler> {
    reply: OneshotSender<Answer<H>>,
    permit: CallerPermit,
}

impl<H: Handler> Caller<H> {
    /// Answers the caller. Releases its permit first, so that its next command can get it.
    fn answer(self, answer: Answer<H>) -> Result<(), Answer<H>> {
        self.permit.release();
        self.reply.send(answer)
    }
}

/// The permit of a caller within the handler's limit, held until the answer or a drop.
#[derive(Clone)]
struct CallerPermit(Arc<Mutex<Option<Arc<OwnedSemaphorePermit>>>>);

impl CallerPermit {
    fn new(permit: Arc<OwnedSemaphorePermit>) -> Self {
        Self(Arc::new(Mutex::new(Some(permit))))
    }

    fn release(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// A guard that releases the permit of a dropped caller, even one that never awaited its answer.
struct ReleaseOnDrop(CallerPermit);

impl Drop for ReleaseOnDrop {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// The shared state of all attempts of one handler.
pub(super) struct Shared<H> {
    pub(super) handler: H,
    pub(super) options: HandlerOptions,
    pub(super) store: Arc<dyn EventStore>,
    /// Dispatcher for nested commands. It owns this handler, so this reference is weak.
    pub(super) commands: Weak<Dispatcher>,
}

/// A handle to a handler's actor. Cloning is cheap.
pub(crate) struct HandlerRouter<H: Handler> {
    /// Current actor. A restart replaces it.
    actor: Arc<RwLock<ActorRef<Message<H>>>>,
    shared: Arc<Shared<H>>,
    admission: Arc<Semaphore>,
    /// Set at the start of a shutdown. No command is admitted afterwards.
    closing: Arc<AtomicBool>,
}

impl<H: Handler> Clone for HandlerRouter<H> {
    fn clone(&self) -> Self {
        let Self { actor, shared, admission, closing } = self;
        Self {
            actor: actor.clone(),
            shared: shared.clone(),
            admission: admission.clone(),
            closing: closing.clone(),
        }
    }
}

impl<H: Handler> fmt::Debug for HandlerRouter<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerRouter").field("status", &self.status()).finish_non_exhaustive()
    }
}

fn spawn<H: Handler>(
    shared: &Arc<Shared<H>>,
    supervisor: ActorCell,
) -> Result<ActorRef<Message<H>>, SpawnErr> {
    Ok(ActorRuntime::spawn_linked_instant(None, HandlerActor(shared.clone()), (), supervisor)?.0)
}

impl<H: Handler> HandlerRouter<H> {
    /// Starts the handler's actor under `supervisor`.
    pub(crate) fn start(
        handler: H,
        options: HandlerOptions,
        store: Arc<dyn EventStore>,
        commands: Weak<Dispatcher>,
        supervisor: ActorCell,
    ) -> Result<Self, SpawnErr> {
        let admission = Arc::new(Semaphore::new(options.in_flight));
        let shared = Arc::new(Shared { handler, options, store, commands });
        let actor = Arc::new(RwLock::new(spawn(&shared, supervisor)?));
        Ok(Self { actor, shared, admission, closing: Arc::default() })
    }

    fn actor(&self) -> ActorRef<Message<H>> {
        self.actor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn status(&self) -> HandlerStatus {
        let limit = self.shared.options.in_flight;
        HandlerStatus { name: H::NAME, in_flight: limit.saturating_sub(self.admission.available_permits()) }
    }

    /// Acquires a permit for the command `id` within the limit of commands in flight.
    ///
    /// Waits for the admission timeout of the options, or until `deadline` if that is earlier.
    pub(crate) async fn admit(
        &self,
        id: Uuid,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, ExecuteError<H::Error>> {
        ExecuteError::check_id(id)?;
        if self.closing.load(Ordering::Acquire) {
            return Err(ExecuteError::ShuttingDown);
        }
        let until = deadline.min(after(self.shared.options.admission));
        match tokio::time::timeout_at(until, self.admission.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_closed)) => Err(ExecuteError::ShuttingDown),
            Err(_elapsed) => Err(ExecuteError::Overloaded {
                what: "commands in flight for this handler".into(),
                limit: self.shared.options.in_flight,
            }),
        }
    }

    /// Sends an admitted command to the actor. The answer fails only if the actor stopped.
    pub(crate) fn hand_over(
        &self,
        job: HandlerJob<H>,
        permit: OwnedSemaphorePermit,
    ) -> Result<impl Future<Output = Result<Answer<H>, Stopped>> + Send + use<H>, ExecuteError<H::Error>>
    {
        let (reply, answer) = oneshot();
        let permit = Arc::new(permit);
        let waiting = CallerPermit::new(permit.clone());
        let caller = Caller { reply, permit: waiting.clone() };
        match self.actor().cast(Message::Run(job, caller, permit)) {
            Ok(()) => Ok(async move {
                let _waiting = ReleaseOnDrop(waiting);
                answer.await.map_err(|_dropped| Stopped)
            }),
            Err(_) if self.closing.load(Ordering::Acquire) => Err(ExecuteError::ShuttingDown),
            Err(_) => {
                let reason = "handler is restarting".into();
                Err(ExecuteError::Store(StoreError::Unavailable { reason, source: None }))
            }
        }
    }

    /// Stops admission, waits for the commands in flight, and stops the actor with its tasks.
    ///
    /// Waits until all commands are answered, or until `deadline`. Returns the number of unanswered
    /// commands.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        self.closing.store(true, Ordering::Release);
        let all = u32::try_from(self.shared.options.in_flight).unwrap_or(u32::MAX);
        let drained = tokio::time::timeout_at(deadline, self.admission.acquire_many(all)).await;
        let unanswered = if drained.is_ok() { 0 } else { self.status().in_flight };
        self.admission.close();
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        if let Err(error) = self.actor().stop_and_wait(Some(SHUTDOWN.into()), Some(left)).await {
            tracing::warn!(handler = H::NAME, %error, "handler did not stop in time");
        }
        unanswered
    }
}

impl<H: Handler> Respawn for HandlerRouter<H> {
    fn name(&self) -> &'static str {
        H::NAME
    }

    fn actor(&self) -> Option<ActorId> {
        Some(self.actor().get_id())
    }

    fn respawn(&self, supervisor: ActorCell) -> Result<ActorId, String> {
        let actor = spawn(&self.shared, supervisor).map_err(|error| error.to_string())?;
        let id = actor.get_id();
        *self.actor.write().unwrap_or_else(PoisonError::into_inner) = actor;
        Ok(id)
    }
}

/// The actor stopped before it answered.
#[derive(Debug)]
pub(crate) struct Stopped;

pub(super) enum Message<H: Handler> {
    /// Run a command for a caller.
    Run(HandlerJob<H>, Caller<H>, Arc<OwnedSemaphorePermit>),
    /// An attempt has ended. `freed`: whether it returned its worker slot.
    Ended { id: Uuid, key: Option<String>, ran: AttemptResult, freed: bool },
    /// A worker slot is free.
    Freed,
    /// An attempt that released its worker slot needs one again.
    Enter(OneshotSender<WorkerPermit<H>>),
}

/// A worker slot. Dropping it frees the slot.
pub(super) struct WorkerPermit<H: Handler> {
    actor: ActorRef<Message<H>>,
    /// Whether another message reports that the slot is free.
    told: bool,
}

impl<H: Handler> WorkerPermit<H> {
    fn new(actor: ActorRef<Message<H>>) -> Self {
        Self { actor, told: false }
    }

    pub(super) fn actor(&self) -> ActorRef<Message<H>> {
        self.actor.clone()
    }

    /// Returns the slot without a separate message: the message about the attempt's end reports it.
    pub(super) fn end(mut self) {
        self.told = true;
    }
}

impl<H: Handler> Drop for WorkerPermit<H> {
    fn drop(&mut self) {
        if !self.told {
            // Without the actor there are no slots.
            let _ = self.actor.cast(Message::Freed);
        }
    }
}

struct HandlerActor<H>(Arc<Shared<H>>);

struct HandlerState<H: Handler> {
    /// Number of free worker slots.
    free: usize,
    /// Attempts that need a slot again. They go first, so that started commands finish.
    resuming: VecDeque<OneshotSender<WorkerPermit<H>>>,
    /// Commands that wait for a worker, in order.
    ready: VecDeque<HandlerJob<H>>,
    /// Commands that wait for others with the same key, in order.
    ///
    /// Every key with a ready or running command has an entry.
    turns: HashMap<String, VecDeque<HandlerJob<H>>>,
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
            Message::Enter(place) => state.resuming.push_back(place),
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
    fn take(&mut self, job: HandlerJob<H>, caller: Caller<H>, permit: Arc<OwnedSemaphorePermit>) {
        if let Some(current) = self.current.get_mut(&job.id) {
            if current.fingerprint != job.fingerprint {
                // A failed send means that the caller has stopped waiting.
                let _ = caller.answer(Err(ExecuteError::CommandIdReused { command_id: job.id }));
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
