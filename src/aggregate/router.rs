//! Routing of one kind of aggregate: id → actor.
//!
//! The router holds the map of actors, admits commands up to the limit, and evicts aggregates from
//! memory. It never awaits I/O, because every command of the kind passes through it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lru::LruCache;
use ractor::{
    Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, ActorRuntime, MessagingErr, SpawnErr,
    SupervisionEvent,
};
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use uuid::Uuid;

pub(crate) use super::actor::CommandRequest;
use super::actor::{AggregateActor, AggregateMessage, InFlightGuard, SNAPSHOTS_UNDER_WAY, Shared};
use super::options::AggregateOptions;
use super::{Aggregate, ExecuteError, NotExecutedKind};
use crate::event::{EncodeError, Event, EventTypes, StreamId};
use crate::store::{EventStore, GroupCommitter};
use crate::supervised::Respawn;
use crate::time::after;

/// Maximum number of aggregates that the router checks when it evicts one for a new one.
const EVICTION_SCAN: usize = 64;

/// The status of one kind of aggregate. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RouterStatus {
    /// Category of the streams.
    pub category: String,
    /// Number of aggregates in memory.
    pub live: usize,
    /// Number of commands in flight.
    pub in_flight: usize,
}

/// A handle to a router. Cloning is cheap.
pub(crate) struct Router<A: Aggregate> {
    /// Current actor. A restart replaces it.
    actor: Arc<RwLock<ActorRef<RouterMessage<A>>>>,
    admission: Arc<Semaphore>,
    shared: Arc<Shared<A>>,
    live: Arc<AtomicUsize>,
    /// Set at the start of a shutdown. No command is admitted afterwards.
    closing: Arc<AtomicBool>,
}

/// An error at the start of a router.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartRouterError {
    #[error(transparent)]
    Events(#[from] EncodeError),
    #[error("cannot start router actor: {0}")]
    Spawn(#[from] SpawnErr),
}

/// Stop reason after which the supervisor does not restart the actor.
pub(crate) const SHUTDOWN: &str = "shutdown";

fn spawn<A: Aggregate>(
    shared: &Arc<Shared<A>>,
    live: &Arc<AtomicUsize>,
    supervisor: ActorCell,
) -> Result<ActorRef<RouterMessage<A>>, SpawnErr> {
    let actor = RouterActor { shared: shared.clone(), live: live.clone() };
    Ok(ActorRuntime::spawn_linked_instant(None, actor, (), supervisor)?.0)
}

impl<A: Aggregate> Clone for Router<A> {
    fn clone(&self) -> Self {
        Self {
            actor: self.actor.clone(),
            admission: self.admission.clone(),
            shared: self.shared.clone(),
            live: self.live.clone(),
            closing: self.closing.clone(),
        }
    }
}

impl<A: Aggregate> fmt::Debug for Router<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl<A: Aggregate> Router<A> {
    /// Starts a router under `supervisor`.
    pub(crate) fn start(
        store: Arc<dyn EventStore>,
        writer: GroupCommitter,
        options: AggregateOptions<A>,
        supervisor: ActorCell,
    ) -> Result<Self, StartRouterError> {
        let admission = Arc::new(Semaphore::new(options.in_flight));
        let live = Arc::new(AtomicUsize::new(0));
        let snapshots = Arc::new(Semaphore::new(SNAPSHOTS_UNDER_WAY));
        let shared =
            Arc::new(Shared { store, writer, options, types: EventTypes::of::<A::Event>()?, snapshots });
        let actor = spawn(&shared, &live, supervisor)?;
        let closing = Arc::new(AtomicBool::new(false));
        Ok(Self { actor: Arc::new(RwLock::new(actor)), admission, shared, live, closing })
    }

    /// Returns the current actor.
    pub(crate) fn actor(&self) -> ActorRef<RouterMessage<A>> {
        self.actor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the stream of an aggregate of this kind.
    pub(crate) fn stream(&self, id: &dyn fmt::Display) -> Result<StreamId, ExecuteError<A::Error>> {
        StreamId::of(self.shared.types.category(), id)
            .map_err(|error| ExecuteError::from(NotExecutedKind::InvalidId { reason: error.to_string() }))
    }

    /// Acquires a permit for the command `id` within the limit of commands in flight.
    ///
    /// Waits for the admission timeout of the options, or until `deadline` if that is earlier.
    pub(crate) async fn admit(
        &self,
        id: Uuid,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, ExecuteError<A::Error>> {
        NotExecutedKind::check_id(id)?;
        let options = &self.shared.options;
        if self.closing.load(Ordering::Acquire) {
            return Err(NotExecutedKind::ShuttingDown.into());
        }
        if let Ok(permit) = self.admission.clone().try_acquire_owned() {
            return Ok(permit);
        }
        let until = deadline.min(after(options.admission));
        match tokio::time::timeout_at(until, self.admission.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_closed)) => Err(NotExecutedKind::ShuttingDown.into()),
            Err(_elapsed) => Err(NotExecutedKind::Overloaded {
                what: "commands in flight for this kind of aggregate".into(),
                limit: options.in_flight,
            }
            .into()),
        }
    }

    /// Sends an admitted command to the actor. The answer arrives at its reply port.
    pub(crate) fn route(
        &self,
        stream: StreamId,
        order: Box<CommandRequest<A>>,
    ) -> Result<(), ExecuteError<A::Error>> {
        self.actor().cast(RouterMessage::Execute(stream, order)).map_err(|_| {
            if self.closing.load(Ordering::Acquire) {
                ExecuteError::from(NotExecutedKind::ShuttingDown)
            } else {
                ExecuteError::from(NotExecutedKind::Restarting { name: A::Event::CATEGORY })
            }
        })
    }

    pub(crate) fn status(&self) -> RouterStatus {
        RouterStatus {
            category: A::Event::CATEGORY.to_owned(),
            live: self.live.load(Ordering::Relaxed),
            in_flight: self.shared.options.in_flight.saturating_sub(self.admission.available_permits()),
        }
    }

    /// Stops admission, waits for the commands in flight, and stops the actors.
    ///
    /// Waits until all commands are answered, or until `deadline`. Returns the number of unanswered
    /// commands.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        self.closing.store(true, Ordering::Release);
        // Holding all permits means that no command is in flight. Closing then rejects waiting
        // callers.
        let all = u32::try_from(self.shared.options.in_flight).unwrap_or(u32::MAX);
        let drained = tokio::time::timeout_at(deadline, self.admission.acquire_many(all)).await;
        let unanswered = if drained.is_ok() { 0 } else { self.status().in_flight };
        self.admission.close();
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        if let Err(error) = self.actor().stop_and_wait(Some(SHUTDOWN.into()), Some(left)).await {
            tracing::warn!(category = A::Event::CATEGORY, %error, "router did not stop in time");
        }
        unanswered
    }
}

impl<A: Aggregate> Respawn for Router<A> {
    fn name(&self) -> &'static str {
        <A::Event as Event>::CATEGORY
    }

    fn actor(&self) -> Option<ActorId> {
        Some(self.actor().get_id())
    }

    /// The first command to each aggregate folds its stream again.
    fn respawn(&self, supervisor: ActorCell) -> Result<ActorId, String> {
        let actor = spawn(&self.shared, &self.live, supervisor).map_err(|error| error.to_string())?;
        let id = actor.get_id();
        *self.actor.write().unwrap_or_else(PoisonError::into_inner) = actor;
        Ok(id)
    }
}

pub(crate) enum RouterMessage<A: Aggregate> {
    /// Execute a command on the aggregate of a stream. Boxed, because it moves between actors.
    Execute(StreamId, Box<CommandRequest<A>>),
    /// Evict aggregates that have been idle for too long.
    Sweep,
}

struct RouterActor<A: Aggregate> {
    shared: Arc<Shared<A>>,
    /// Number of aggregates in memory, for the status, which must not queue after commands.
    live: Arc<AtomicUsize>,
}

struct RouterState<A: Aggregate> {
    /// Aggregates in memory, least recently used last. At most `max_live`.
    entries: LruCache<StreamId, Entry<A>>,
    /// Task that sends [`RouterMessage::Sweep`]. It ends with the router.
    sweeper: JoinHandle<()>,
}

struct Entry<A: Aggregate> {
    actor: ActorRef<AggregateMessage<A>>,
    /// Number of commands in flight, see [`InFlightGuard`].
    load: Arc<AtomicUsize>,
    last_used: Instant,
}

impl<A: Aggregate> Entry<A> {
    fn is_idle(&self) -> bool {
        self.load.load(Ordering::Acquire) == 0
    }
}

impl<A: Aggregate> Actor for RouterActor<A> {
    type Msg = RouterMessage<A>;
    type State = RouterState<A>;
    type Arguments = ();

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        (): (),
    ) -> Result<Self::State, ActorProcessingErr> {
        let every = (self.shared.options.idle / 4).clamp(Duration::from_millis(10), Duration::from_secs(30));
        let sweeper = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(every);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                if myself.cast(RouterMessage::Sweep).is_err() {
                    return;
                }
            }
        });
        // The cache is unbounded, because a bounded one would drop busy entries. The router itself
        // evicts entries.
        Ok(RouterState { entries: LruCache::unbounded(), sweeper })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RouterMessage::Execute(stream, order) => self.execute(&myself, stream, order, state),
            RouterMessage::Sweep => self.sweep(state),
        }
        self.live.store(state.entries.len(), Ordering::Relaxed);
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<Self::Msg>,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        state.sweeper.abort();
        Ok(())
    }

    /// Keeps the router alive when the actor of an aggregate ends. Ractor's default ends it.
    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        // The map no longer holds evicted actors. Actors catch panics of user code, so a failure is
        // a bug in storied. It is rare enough for a linear search.
        if let SupervisionEvent::ActorFailed(actor, error) = event {
            tracing::error!(category = A::Event::CATEGORY, %error, "the actor of an aggregate failed");
            let failed = state.entries.iter().find(|(_, entry)| entry.actor.get_id() == actor.get_id());
            if let Some(stream) = failed.map(|(stream, _)| stream.clone()) {
                state.entries.pop(&stream);
            }
        }
        Ok(())
    }
}

impl<A: Aggregate> RouterActor<A> {
    fn execute(
        &self,
        myself: &ActorRef<RouterMessage<A>>,
        stream: StreamId,
        order: Box<CommandRequest<A>>,
        state: &mut RouterState<A>,
    ) {
        let now = Instant::now();
        let mut message = order;
        if let Some(entry) = state.entries.get_mut(&stream) {
            entry.last_used = now;
            let limit = self.shared.options.in_flight_each();
            if entry.load.load(Ordering::Relaxed) >= limit {
                let error = ExecuteError::from(NotExecutedKind::Overloaded {
                    what: "commands in flight for one aggregate".into(),
                    limit,
                });
                return refuse(*message, error);
            }
            match entry.actor.cast(AggregateMessage::Execute(message, InFlightGuard::new(&entry.load))) {
                Ok(()) => return,
                // The actor has ended meanwhile. The cast returns the message, which goes to a new
                // actor.
                Err(MessagingErr::SendErr(AggregateMessage::Execute(order, _))) => {
                    state.entries.pop(&stream);
                    message = order;
                }
                Err(_) => return,
            }
        }
        if state.entries.len() >= self.shared.options.live && !make_room(&mut state.entries) {
            let limit = self.shared.options.live;
            return refuse(
                *message,
                ExecuteError::from(NotExecutedKind::Overloaded { what: "active aggregates".into(), limit }),
            );
        }
        let actor = AggregateActor { shared: self.shared.clone(), stream: stream.clone() };
        // An instant spawn does not block the router: the actor folds its stream at its first
        // message.
        match ActorRuntime::spawn_linked_instant(None, actor, (), myself.get_cell()) {
            Ok((actor, _)) => {
                let load = Arc::new(AtomicUsize::new(0));
                if actor.cast(AggregateMessage::Execute(message, InFlightGuard::new(&load))).is_ok() {
                    state.entries.put(stream, Entry { actor, load, last_used: now });
                }
            }
            Err(error) => {
                tracing::error!(%stream, %error, "could not start the actor of an aggregate");
                refuse(*message, ExecuteError::from(NotExecutedKind::ShuttingDown));
            }
        }
    }

    fn sweep(&self, state: &mut RouterState<A>) {
        let Some(cutoff) = Instant::now().checked_sub(self.shared.options.idle) else { return };
        // Start at the least recently used entry and stop at the first recently used one. Busy
        // entries stay and move to the front.
        for _ in 0..state.entries.len() {
            match state.entries.peek_lru() {
                Some((_, entry)) if entry.last_used <= cutoff => {}
                _ => return,
            }
            let Some((stream, entry)) = state.entries.pop_lru() else { return };
            if entry.is_idle() {
                passivate(&entry);
            } else {
                state.entries.put(stream, entry);
            }
        }
    }
}

/// Evicts the least recently used idle aggregate.
///
/// Returns whether one of the [`EVICTION_SCAN`] least recently used aggregates was idle.
fn make_room<A: Aggregate>(entries: &mut LruCache<StreamId, Entry<A>>) -> bool {
    for _ in 0..EVICTION_SCAN.min(entries.len()) {
        let Some((stream, entry)) = entries.pop_lru() else { return false };
        if entry.is_idle() {
            passivate(&entry);
            return true;
        }
        entries.put(stream, entry);
    }
    false
}

/// Stops the actor of an idle aggregate.
///
/// No command is in flight there, and only the router could send one.
fn passivate<A: Aggregate>(entry: &Entry<A>) {
    entry.actor.stop(Some("passivated".into()));
}

fn refuse<A: Aggregate>(order: CommandRequest<A>, error: ExecuteError<A::Error>) {
    // A failed send means that the caller has stopped waiting.
    let _ = order.reply.send(Err(error));
}
