//! Worker slots that an attempt releases while it waits for a nested command.

use std::sync::Arc;

use futures_util::future::Either;

use crate::future::BoxFuture;

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
pub(in crate::command) fn yield_slot_while<T>(
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
