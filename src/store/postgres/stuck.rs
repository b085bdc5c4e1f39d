//! Counts the appends whose server processes still wait for a synchronous standby.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::StoreError;
use super::append_failure::{DOING, Failure};

/// Maximum number of stuck appends.
///
/// The server process of a stuck append waits for a standby, although its caller was answered
/// `OutcomeUnknown`.
const STUCK: usize = 8;

/// Appends with a server process that still waits for a synchronous standby.
///
/// Each holds a connection of the server.
#[derive(Debug, Default)]
pub(super) struct Stuck(pub(super) AtomicUsize);

impl Stuck {
    /// Rejects another append at the limit, because its server process would become stuck too.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let stuck = self.0.load(Ordering::Acquire);
        if stuck < STUCK {
            return Ok(());
        }
        let reason = format!(
            "{DOING}: {stuck} earlier appends wait for a synchronous standby (limit {STUCK}); check the standbys"
        );
        Err(Failure::Failed(StoreError::Unavailable { reason, source: None }))
    }
}
