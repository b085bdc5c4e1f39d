//! Routing of one kind of aggregate: id → actor.
//!
//! The router holds the map of actors and evicts aggregates from memory. It never awaits I/O, because
//! every command of the kind passes through it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lru::LruCache;
use ractor::{Actor, ActorProcessingErr, ActorRef, ActorRuntime, MessagingErr, SupervisionEvent};
use serde::Serialize;
use tokio::time::Instant;

use super::actor::{AggregateActor, AggregateMessage, CommandRequest, InFlightGuard, Shared};
use super::{Aggregate, ExecuteError, NotExecutedKind};
use crate::event::{Event, StreamId};
use crate::supervised::Task;

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

pub(crate) enum RouterMessage<A: Aggregate> {
    /// Execute a command on the aggregate of a stream. Boxed, because it moves between actors.
    Execute(StreamId, Box<CommandRequest<A>>),
    /// Evict aggregates that have been idle for too long.
    Sweep,
}

/// The router of one kind of aggregate.
///
/// After a restart, the first command to each aggregate folds its stream again.
pub(crate) struct RouterActor<A: Aggregate>(pub(crate) Arc<Shared<A>>);

pub(crate) struct RouterState<A: Aggregate> {
    /// Aggregates in memory, least recently used last. At most `max_live`.
    entries: LruCache<StreamId, Entry<A>>,
    /// Task that sends [`RouterMessage::Sweep`]. It ends with the router.
    _sweeper: Task,
}

pub(crate) struct Entry<A: Aggregate> {
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
        let every = (self.0.options.idle / 4).clamp(Duration::from_millis(10), Duration::from_secs(30));
        let sweeper = Task::spawn(async move {
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
        Ok(RouterState { entries: LruCache::unbounded(), _sweeper: sweeper })
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
        self.0.live.store(state.entries.len(), Ordering::Relaxed);
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
            let limit = self.0.options.in_flight_each();
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
        if state.entries.len() >= self.0.options.live && !make_room(&mut state.entries) {
            let limit = self.0.options.live;
            return refuse(
                *message,
                ExecuteError::from(NotExecutedKind::Overloaded { what: "active aggregates".into(), limit }),
            );
        }
        let actor = AggregateActor { shared: self.0.clone(), stream: stream.clone() };
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
        let Some(cutoff) = Instant::now().checked_sub(self.0.options.idle) else { return };
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
