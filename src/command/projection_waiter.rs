//! The port through which commands wait for projections.

use std::time::Duration;

use crate::event::Position;
use crate::future::BoxFuture;

/// Waits for projections. The runtime implements it: this module does not depend on projections.
pub(crate) trait ProjectionWaiter: Send + Sync {
    /// Returns the names of the projections on this node.
    fn names(&self) -> Vec<String>;
    /// Waits until the projection `name` has reached `position`.
    fn caught_up<'a>(
        &'a self,
        name: &'a str,
        position: Position,
        patience: Duration,
    ) -> BoxFuture<'a, Result<(), String>>;
}
