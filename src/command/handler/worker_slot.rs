//! The worker slot of an attempt: it returns to the actor while the attempt waits.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ractor::ActorRef;
use ractor::concurrency::oneshot;

use super::Handler;
use super::message::{Message, WorkerPermit};
use super::yield_slot::YieldSlot;
use crate::future::BoxFuture;

/// The worker slot of an attempt.
pub(super) struct WorkerSlot<H: Handler> {
    actor: ActorRef<Message<H>>,
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
    pub(super) fn new(worker: WorkerPermit<H>) -> Self {
        let actor = worker.actor();
        let held = Mutex::new(Held { worker: Some(worker), waits: 0 });
        Self { actor, held }
    }

    fn held(&self) -> MutexGuard<'_, Held<H>> {
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
