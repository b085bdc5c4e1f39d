//! The callers of a command, and their permits.

use std::sync::{Arc, Mutex, PoisonError};

use ractor::concurrency::OneshotSender;
use tokio::sync::OwnedSemaphorePermit;

use super::Handler;
use crate::command::target::{Answer, ToHandler};

/// A caller that waits for the answer to a command.
pub(crate) struct Caller<H: Handler> {
    pub(super) reply: OneshotSender<Answer<ToHandler<H>>>,
    pub(super) permit: CallerPermit,
}

impl<H: Handler> Caller<H> {
    /// Answers the caller. Releases its permit first, so that its next command can get it.
    pub(super) fn answer(self, answer: Answer<ToHandler<H>>) -> Result<(), Answer<ToHandler<H>>> {
        self.permit.release();
        self.reply.send(answer)
    }
}

/// The permit of a caller within the handler's limit, held until the answer or a drop.
#[derive(Clone)]
pub(super) struct CallerPermit(Arc<Mutex<Option<Arc<OwnedSemaphorePermit>>>>);

impl CallerPermit {
    pub(super) fn new(permit: Arc<OwnedSemaphorePermit>) -> Self {
        Self(Arc::new(Mutex::new(Some(permit))))
    }

    fn release(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// A guard that releases the permit of a dropped caller, even one that never awaited its answer.
pub(crate) struct ReleaseOnDrop(pub(super) CallerPermit);

impl Drop for ReleaseOnDrop {
    fn drop(&mut self) {
        self.0.release();
    }
}
