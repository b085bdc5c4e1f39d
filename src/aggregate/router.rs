//! The router of one kind of aggregate: id → actor. Holds the map, admits what fits, and decides who leaves memory; never
//! awaits I/O, because every command of the kind passes through it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lru::LruCache;
use ractor::{
    Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, ActorRuntime, MessagingErr, SpawnErr,
    SupervisionEvent,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use uuid::Uuid;

pub(crate) use super::actor::Order;
use super::actor::{AggregateActor, AggregateMessage, Load, SNAPSHOTS_UNDER_WAY, Shared};
use super::options::AggregateOptions;
use super::{Aggregate, ExecuteError};
use crate::event::{EncodeError, Event, EventTypes, StreamId};
use crate::store::{EventStore, StoreError, Writer};
use crate::time::after;

/// How many idle aggregates at most are looked at to make room for a new one.
const EVICTION_SCAN: usize = 64;

/// How a kind of aggregate is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RouterStatus {
    /// The category of its streams.
    pub category: String,
    /// Aggregates in memory.
    pub live: usize,
    /// Commands under way.
    pub in_flight: usize,
}

/// The handle of a router; cheap to clone.
pub(crate) struct Router<A: Aggregate> {
    /// The actor of the moment: another one after a restart.
    actor: Arc<RwLock<ActorRef<RouterMessage<A>>>>,
    admission: Arc<Semaphore>,
    shared: Arc<Shared<A>>,
    live: Arc<AtomicUsize>,
    /// Set when the end begins: nobody is admitted any more.
    closing: Arc<AtomicBool>,
}

/// Why a router does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartRouterError {
    #[error(transparent)]
    Events(#[from] EncodeError),
    #[error("the router's actor cannot be started: {0}")]
    Spawn(#[from] SpawnErr),
}

/// The reason of a stop that nobody is to be started again after.
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
        writer: Writer,
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

    /// Replaces the actor by a new one, when the old one is gone. Aggregates are folded anew by the first command.
    pub(crate) fn respawn(&self, supervisor: ActorCell) -> Result<ActorId, SpawnErr> {
        let actor = spawn(&self.shared, &self.live, supervisor)?;
        let id = actor.get_id();
        *self.actor.write().unwrap_or_else(PoisonError::into_inner) = actor;
        Ok(id)
    }

    /// The actor of the moment.
    pub(crate) fn actor(&self) -> ActorRef<RouterMessage<A>> {
        self.actor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The stream of an aggregate of this kind.
    pub(crate) fn stream(&self, id: &dyn fmt::Display) -> Result<StreamId, ExecuteError<A::Error>> {
        StreamId::of(self.shared.types.category(), id)
            .map_err(|error| ExecuteError::InvalidId { reason: error.to_string() })
    }

    /// A place among the commands under way, for the command `id`. Waits for one as long as the options say (or until
    /// `deadline`).
    pub(crate) async fn admit(
        &self,
        id: Uuid,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, ExecuteError<A::Error>> {
        ExecuteError::check_id(id)?;
        let options = &self.shared.options;
        if self.closing.load(Ordering::Acquire) {
            return Err(ExecuteError::ShuttingDown);
        }
        if let Ok(permit) = self.admission.clone().try_acquire_owned() {
            return Ok(permit);
        }
        let until = deadline.min(after(options.admission));
        match tokio::time::timeout_at(until, self.admission.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_closed)) => Err(ExecuteError::ShuttingDown),
            Err(_elapsed) => Err(ExecuteError::Overloaded {
                what: "commands under way on this kind of aggregate".into(),
                limit: options.in_flight,
            }),
        }
    }

    /// Hands an admitted command over; the answer comes through its reply port.
    pub(crate) fn route(&self, stream: StreamId, order: Box<Order<A>>) -> Result<(), ExecuteError<A::Error>> {
        self.actor().cast(RouterMessage::Execute(stream, order)).map_err(|_| {
            if self.closing.load(Ordering::Acquire) {
                ExecuteError::ShuttingDown
            } else {
                let reason = "the router is being started again".into();
                ExecuteError::Store(StoreError::Unavailable { reason, source: None })
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

    /// Takes no more commands, waits until those under way are answered (or until `deadline`), and stops the actors. How
    /// many were not answered.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        self.closing.store(true, Ordering::Release);
        // All places taken means that nothing is under way; closing then refuses whoever still waits.
        let all = u32::try_from(self.shared.options.in_flight).unwrap_or(u32::MAX);
        let drained = tokio::time::timeout_at(deadline, self.admission.acquire_many(all)).await;
        let unanswered = if drained.is_ok() { 0 } else { self.status().in_flight };
        self.admission.close();
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        if let Err(error) = self.actor().stop_and_wait(Some(SHUTDOWN.into()), Some(left)).await {
            tracing::warn!(category = A::Event::CATEGORY, %error, "the router did not stop in time");
        }
        unanswered
    }
}

pub(crate) enum RouterMessage<A: Aggregate> {
    /// A command for the aggregate of a stream. Boxed, as it moves from actor to actor.
    Execute(StreamId, Box<Order<A>>),
    /// Time to see who has been idle for too long.
    Sweep,
}

struct RouterActor<A: Aggregate> {
    shared: Arc<Shared<A>>,
    /// For the status, which must not queue behind commands.
    live: Arc<AtomicUsize>,
}

struct RouterState<A: Aggregate> {
    /// The live aggregates, least recently used last. Never more than `max_live`.
    entries: LruCache<StreamId, Entry<A>>,
    /// Sends [`RouterMessage::Sweep`]; ends with the router.
    sweeper: JoinHandle<()>,
}

struct Entry<A: Aggregate> {
    actor: ActorRef<AggregateMessage<A>>,
    /// Commands under way, see [`Load`].
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
        // Unbounded as far as the cache goes, which would drop whoever is last; who leaves is decided here.
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

    /// An aggregate's actor that ends is no reason to end, which would be ractor's default.
    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        // Who was sent away is not in the map any more. User code's panics are caught in the actor, so a failure is a bug
        // of ours; rare enough to search for the entry.
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
        order: Box<Order<A>>,
        state: &mut RouterState<A>,
    ) {
        let now = Instant::now();
        let mut message = order;
        if let Some(entry) = state.entries.get_mut(&stream) {
            entry.last_used = now;
            let limit = self.shared.options.in_flight_each();
            if entry.load.load(Ordering::Relaxed) >= limit {
                let error =
                    ExecuteError::Overloaded { what: "commands under way on one aggregate".into(), limit };
                return refuse(*message, error);
            }
            match entry.actor.cast(AggregateMessage::Execute(message, Load::new(&entry.load))) {
                Ok(()) => return,
                // The actor has died since: the message comes back, and goes to its successor.
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
                ExecuteError::Overloaded {
                    what: "live aggregates, the least recently used ones busy,".into(),
                    limit,
                },
            );
        }
        let actor = AggregateActor { shared: self.shared.clone(), stream: stream.clone() };
        // Instant: the actor folds its stream when it takes its first message, and the router goes on.
        match ActorRuntime::spawn_linked_instant(None, actor, (), myself.get_cell()) {
            Ok((actor, _)) => {
                let load = Arc::new(AtomicUsize::new(0));
                if actor.cast(AggregateMessage::Execute(message, Load::new(&load))).is_ok() {
                    state.entries.put(stream, Entry { actor, load, last_used: now });
                }
            }
            Err(error) => {
                tracing::error!(%stream, %error, "the actor of an aggregate cannot be started");
                refuse(*message, ExecuteError::ShuttingDown);
            }
        }
    }

    fn sweep(&self, state: &mut RouterState<A>) {
        let Some(cutoff) = Instant::now().checked_sub(self.shared.options.idle) else { return };
        // From the least recently used on, until the first that was used lately; busy ones are kept and moved on.
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

/// Sends the least recently used idle aggregate away. Whether there was one among the first few.
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

/// Nothing is under way on the aggregate, and only the router could send it something: it can just stop.
fn passivate<A: Aggregate>(entry: &Entry<A>) {
    entry.actor.stop(Some("passivated".into()));
}

fn refuse<A: Aggregate>(order: Order<A>, error: ExecuteError<A::Error>) {
    // A caller that has gone away needs no answer.
    let _ = order.reply.send(Err(error));
}
