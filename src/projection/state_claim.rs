//! The claim of a running projection on the memory that it folds into.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Addresses of all states that a running projection folds into.
static CLAIMED: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

/// Maximum wait for the previous run: a dropped runtime tears its tasks down in the background.
const PATIENCE: Duration = Duration::from_secs(2);

/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(10);

/// A state in memory that may outlive the runtime that folds into it.
pub(crate) struct SharedState {
    address: usize,
    /// Keeps the address from being reused.
    _state: Box<dyn Send + Sync>,
}

/// Held while one projection folds into a state; released on drop.
#[derive(Debug)]
pub(crate) struct StateClaim(SharedState);

impl SharedState {
    pub(crate) fn of<T: ?Sized + Send + Sync + 'static>(state: &Arc<T>) -> Self {
        let address = Arc::as_ptr(state).cast::<()>() as usize;
        Self { address, _state: Box::new(state.clone()) }
    }

    /// Claims the state; returns it if another projection of this process folds into it.
    pub(crate) async fn claim(self) -> Result<StateClaim, Self> {
        let deadline = Instant::now() + PATIENCE;
        while !claimed().insert(self.address) {
            if Instant::now() >= deadline {
                return Err(self);
            }
            sleep(RETRY).await;
        }
        Ok(StateClaim(self))
    }
}

impl fmt::Debug for SharedState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedState").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for StateClaim {
    fn drop(&mut self) {
        claimed().remove(&self.0.address);
    }
}

fn claimed() -> MutexGuard<'static, BTreeSet<usize>> {
    // A set of numbers is complete even after a panic.
    CLAIMED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_projection_at_a_time_folds_into_a_state() {
        let (state, other) = (Arc::new(()), Arc::new(()));
        let first = SharedState::of(&state).claim().await.unwrap();
        let _other = SharedState::of(&other).claim().await.unwrap();
        SharedState::of(&state).claim().await.unwrap_err();
        let next = tokio::spawn(SharedState::of(&state).claim());
        drop(first);
        assert!(next.await.unwrap().is_ok());
    }
}
