use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Utc};
use futures_util::future::Either;
use ractor::concurrency::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::actor::{HandlerJob, Message, WorkerPermit};
use super::{Handler, Request};
use crate::aggregate::Aggregate;
use crate::command::Execute;
use crate::command::bus::Dispatcher;
use crate::command::envelope::Envelope;
use crate::command::wire::Kind;
use crate::command_id;
use crate::event::{Event, Metadata};
use crate::future::BoxFuture;

/// The context of an attempt: the command's metadata, and the means to send nested commands.
pub struct HandlerContext {
    commands: Arc<Dispatcher>,
    id: Uuid,
    metadata: Metadata,
    now: DateTime<Utc>,
    /// End of the attempt's time limit.
    deadline: Instant,
    /// Number of commands sent to each target. It makes their ids the same in every attempt.
    given: Mutex<HashMap<String, u64>>,
    slot: Arc<dyn YieldSlot>,
}

/// A worker slot that an attempt releases while it waits for a nested command.
pub(in crate::command) trait YieldSlot: Send + Sync {
    /// Releases the slot for another command.
    fn release(&self);
    /// Reacquires a slot.
    fn reacquire(&self) -> BoxFuture<'_, ()>;
    /// Ends the wait without reacquiring a slot.
    fn abandon(&self);
    /// Ends the attempt. Takes the slot without a message, and returns whether there was one.
    fn end(&self) -> bool;
}

/// Releases the worker slot, if there is one, while `wait` runs.
pub(in crate::command) fn give_way<T>(
    slot: Option<Arc<dyn YieldSlot>>,
    wait: impl Future<Output = T>,
) -> impl Future<Output = T> {
    // Most commands do not come from a handler. Their future stays small.
    match slot {
        None => Either::Left(wait),
        Some(slot) => Either::Right(Box::pin(leave_and_wait(slot, wait))),
    }
}

async fn leave_and_wait<T>(slot: Arc<dyn YieldSlot>, wait: impl Future<Output = T>) -> T {
    struct Leave(Option<Arc<dyn YieldSlot>>);

    impl Drop for Leave {
        fn drop(&mut self) {
            if let Some(slot) = self.0.take() {
                slot.abandon();
            }
        }
    }

    slot.release();
    let mut left = Leave(Some(slot.clone()));
    let result = wait.await;
    left.0 = None;
    slot.reacquire().await;
    result
}

struct WorkerSlot<H: Handler> {
    actor: ractor::ActorRef<Message<H>>,
    held: Mutex<Held<H>>,
}

struct Held<H: Handler> {
    worker: Option<WorkerPermit<H>>,
    /// Number of nested commands that the attempt waits for.
    ///
    /// The first wait releases the slot, and the end of the last one reacquires it.
    waits: usize,
}

impl<H: Handler> WorkerSlot<H> {
    fn held(&self) -> std::sync::MutexGuard<'_, Held<H>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H: Handler> YieldSlot for WorkerSlot<H> {
    fn release(&self) {
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
        worker.map(WorkerPermit::end).is_some()
    }

    fn reacquire(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let (slot, granted) = oneshot();
            {
                let mut held = self.held();
                held.waits = held.waits.saturating_sub(1);
                if held.waits > 0 || held.worker.is_some() {
                    return;
                }
            }
            // If the actor has ended, this attempt ends too.
            if self.actor.cast(Message::Enter(slot)).is_ok()
                && let Ok(worker) = granted.await
            {
                let mut held = self.held();
                // If another wait has started meanwhile, return the slot: the command of that
                // wait may need it.
                let needless = if held.waits == 0 { held.worker.replace(worker) } else { Some(worker) };
                drop(held);
                drop(needless);
            }
        })
    }
}

impl HandlerContext {
    pub(super) fn new<H: Handler>(
        commands: Arc<Dispatcher>,
        worker: WorkerPermit<H>,
        job: &HandlerJob<H>,
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
            slot: Arc::new(WorkerSlot { actor, held }),
        }
    }

    /// Returns the id of the command.
    pub fn command_id(&self) -> Uuid {
        self.id
    }

    /// Returns the metadata of the command: correlation, trace context and the user's map.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Returns the start of this attempt. Every attempt has its own time.
    pub fn now(&self) -> DateTime<Utc> {
        self.now
    }

    /// Sends a command to an aggregate on any node.
    ///
    /// It works as [`Runtime::execute`](crate::Runtime::execute), with this command as the cause.
    /// The id is derived from this command's id, the aggregate, and the number of earlier commands
    /// to it. The command has at most the time that is left to this attempt
    /// ([`HandlerOptions::time_limit`](super::HandlerOptions::time_limit)).
    pub fn execute<A: Aggregate>(&self, id: impl fmt::Display, command: impl Into<A::Command>) -> Execute<A> {
        let id = id.to_string();
        let envelope = self.envelope(Kind::Aggregate, <A::Event as Event>::CATEGORY, &id);
        Execute::new(self.commands.clone(), id, command.into(), envelope).within(self.slot.clone())
    }

    /// Sends a command to a handler on any node, as [`execute`](Self::execute) does.
    ///
    /// A command with the key of the current command waits for it until the time limit.
    pub fn command<H: Handler>(&self, command: H::Command) -> Request<H> {
        let key = H::key(&command).unwrap_or_default();
        let envelope = self.envelope(Kind::Handler, H::NAME, &key);
        Request::new(self.commands.clone(), command, envelope).within(self.slot.clone())
    }

    /// Ends the attempt. Returns whether that frees a worker slot.
    pub(super) fn end(self) -> bool {
        self.slot.end()
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
