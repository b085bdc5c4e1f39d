//! One term as the publisher: its lease, and the checkpoint that it writes.

use std::time::Duration;

use tokio::time::Instant;

use super::interruption::Interruption;
use super::shared::Shared;
use crate::backoff::Backoff;
use crate::bus::{BusError, LogStreamEnd};
use crate::lease::HeldLease;
use crate::rate_limit::LogLimit;
use crate::store::PublisherCheckpoint;

/// Minimum interval between two checkpoint writes while few events are published.
/// After a crash, the messages that the log stream got since are compared with the log.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// One term as the publisher.
pub(super) struct PublisherTerm<'a> {
    pub(super) shared: &'a Shared,
    pub(super) lease: HeldLease,
    /// Epoch under which the checkpoint is written.
    pub(super) epoch: u64,
    /// The checkpoint in the store.
    pub(super) saved: PublisherCheckpoint,
    /// End of the last confirmed publish.
    pub(super) end: LogStreamEnd,
    /// Earliest time of the next checkpoint write.
    pub(super) save_at: Instant,
    /// Time of the next heartbeat.
    pub(super) beat_at: Instant,
    pub(super) backoff: &'a mut Backoff,
    /// Checkpoint that this process wrote when a message of another program fenced it.
    /// It is exactly the end of the log stream.
    pub(super) fenced: &'a mut Option<PublisherCheckpoint>,
    /// Counter of messages that are not events of the log.
    pub(super) foreign: &'a mut LogLimit,
}

impl PublisherTerm<'_> {
    /// Whether the checkpoint in the store is older than the last confirmed publish.
    pub(super) fn is_unsaved(&self) -> bool {
        (self.saved.position, self.saved.sequence) != (self.end.position, self.end.sequence)
    }

    /// Saves the checkpoint.
    pub(super) async fn save(&mut self) -> Result<(), Interruption> {
        self.save_at = Instant::now() + SAVE_EVERY;
        let LogStreamEnd { position, sequence } = self.end;
        let to = PublisherCheckpoint { position, epoch: self.epoch, sequence };
        if to != self.saved {
            if !self.shared.store.save_publisher_checkpoint(self.saved, to).await? {
                return Err(Interruption::Fenced { expected: self.saved });
            }
            self.saved = to;
        }
        Ok(())
    }

    /// Writes the checkpoint after an error of the bus. The next attempt starts there.
    pub(super) async fn keep(&mut self, confirmed: Option<LogStreamEnd>, error: &BusError) {
        self.end = confirmed.unwrap_or(self.end);
        match self.save().await {
            Ok(()) if matches!(error, BusError::Fenced { .. }) => *self.fenced = Some(self.saved),
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, "could not write the publisher checkpoint"),
        }
    }
}
