use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Utc};
use futures_util::future::Either;
use ractor::concurrency::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::actor::{Job, Message, Worker};
use super::{Handler, Request};
use crate::aggregate::Aggregate;
use crate::command::Execute;
use crate::command::bus::Commands;
use crate::command::envelope::Envelope;
use crate::command::wire::Kind;
use crate::command_id;
use crate::event::{Event, Metadata};
use crate::future::BoxFuture;

/// What a handler has while it handles a command: who asks, and the way to further commands.
pub struct HandlerContext {
    commands: Arc<Commands>,
    id: Uuid,
    metadata: Metadata,
    now: DateTime<Utc>,
    /// When the attempt is over.
    deadline: Instant,
    /// How many commands were given to whom, so that each has an id that is the same in every attempt.
    given: Mutex<HashMap<String, u64>>,
    place: Arc<dyn GiveWay>,
}

/// A worker's place, as far as a command that another one waits for is concerned.
pub(in crate::command) trait GiveWay: Send + Sync {
    /// Lets the next one have the place.
    fn leave(&self);
    /// Has a place again.
    fn enter(&self) -> BoxFuture<'_, ()>;
    /// Does not wait any more, without wanting a place.
    fn abandon(&self);
    /// The attempt is over: takes the place, if there is one, without telling anybody.
    fn end(&self) -> bool;
}

/// Waits for something without keeping others from working meanwhile.
pub(in crate::command) fn give_way<T>(
    place: Option<Arc<dyn GiveWay>>,
    wait: impl Future<Output = T>,
) -> impl Future<Output = T> {
    // Most commands are not given by a handler: they need not carry what these do.
    match place {
        None => Either::Left(wait),
        Some(place) => Either::Right(Box::pin(leave_and_wait(place, wait))),
    }
}

async fn leave_and_wait<T>(place: Arc<dyn GiveWay>, wait: impl Future<Output = T>) -> T {
    struct Leave(Option<Arc<dyn GiveWay>>);

    impl Drop for Leave {
        fn drop(&mut self) {
            if let Some(place) = self.0.take() {
                place.abandon();
            }
        }
    }

    place.leave();
    let mut left = Leave(Some(place.clone()));
    let result = wait.await;
    left.0 = None;
    place.enter().await;
    result
}

struct Place<H: Handler> {
    actor: ractor::ActorRef<Message<H>>,
    held: Mutex<Held<H>>,
}

struct Held<H: Handler> {
    worker: Option<Worker<H>>,
    /// Commands that are being waited for. The place is given away with the first and wanted again after the last.
    waits: usize,
}

impl<H: Handler> Place<H> {
    fn held(&self) -> std::sync::MutexGuard<'_, Held<H>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H: Handler> GiveWay for Place<H> {
    fn leave(&self) {
        let mut held = self.held();
        held.waits += 1;
        held.worker = None;
    }

    fn abandon(&self) {
        let mut held = self.held();
        held.waits = held.waits.saturating_sub(1);
    }

    fn end(&self) -> bool {
        let worker = self.held().worker.take();
        worker.map(Worker::end).is_some()
    }

    fn enter(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let (place, granted) = oneshot();
            {
                let mut held = self.held();
                held.waits = held.waits.saturating_sub(1);
                if held.waits > 0 || held.worker.is_some() {
                    return;
                }
            }
            // An actor that is gone ends this attempt, too.
            if self.actor.cast(Message::Enter(place)).is_ok()
                && let Ok(worker) = granted.await
            {
                let mut held = self.held();
                // Whoever has begun to wait meanwhile may need the very place.
                let needless = if held.waits == 0 { held.worker.replace(worker) } else { Some(worker) };
                drop(held);
                drop(needless);
            }
        })
    }
}

impl HandlerContext {
    pub(super) fn new<H: Handler>(
        commands: Arc<Commands>,
        worker: Worker<H>,
        job: &Job<H>,
        deadline: Instant,
    ) -> Self {
        let actor = worker.actor();
        let held = Mutex::new(Held { worker: Some(worker), waits: 0 });
        Self {
            commands,
            id: job.id,
            metadata: job.metadata.clone(),
            now: Utc::now(),
            deadline,
            given: Mutex::default(),
            place: Arc::new(Place { actor, held }),
        }
    }

    /// The id of the command that is being handled.
    pub fn command_id(&self) -> Uuid {
        self.id
    }

    /// What came with it: correlation, trace context, the user's map.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// When this attempt began. Another attempt has another time.
    pub fn now(&self) -> DateTime<Utc> {
        self.now
    }

    /// Gives a command to an aggregate, wherever it lives: as [`Runtime::execute`](crate::Runtime::execute), with this
    /// command as its cause and an id that is derived from this command's, the aggregate, and how many commands were given
    /// to it before. It has no more time than this attempt has ([`HandlerOptions::time_limit`](super::HandlerOptions::time_limit)).
    pub fn execute<A: Aggregate>(&self, id: impl fmt::Display, command: impl Into<A::Command>) -> Execute<A> {
        let id = id.to_string();
        let envelope = self.envelope(Kind::Aggregate, <A::Event as Event>::CATEGORY, &id);
        Execute::new(self.commands.clone(), id, command.into(), envelope).within(self.place.clone())
    }

    /// Gives a command to a handler, likewise. One that has the same key as the command that is being handled would wait
    /// for it until its time is over.
    pub fn command<H: Handler>(&self, command: H::Command) -> Request<H> {
        let key = H::key(&command).unwrap_or_default();
        let envelope = self.envelope(Kind::Handler, H::NAME, &key);
        Request::new(self.commands.clone(), command, envelope).within(self.place.clone())
    }

    /// The attempt is over. Whether that frees a worker's place.
    pub(super) fn end(self) -> bool {
        self.place.end()
    }

    fn envelope(&self, kind: Kind, name: &str, key: &str) -> Envelope {
        let step = format!("{kind:?} {name} {key}");
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let count = given.entry(step.clone()).or_default();
        *count += 1;
        let id = command_id::derived(self.id, &format!("{count} {step}"));
        let metadata = Metadata {
            correlation_id: Some(self.metadata.correlation_id.unwrap_or(self.id)),
            causation_id: Some(self.id),
            ..self.metadata.clone()
        };
        Envelope::within(id, metadata, self.deadline)
    }
}

impl fmt::Debug for HandlerContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerContext").field("command_id", &self.id).finish_non_exhaustive()
    }
}
