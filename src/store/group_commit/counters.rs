//! The totals of a writer.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// The counters of a writer, for its status.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) transactions: AtomicU64,
    pub(super) appends: AtomicU64,
    pub(super) events: AtomicU64,
    pub(super) conflicts: AtomicU64,
    pub(super) failures: AtomicU64,
}

/// The totals of a writer since its start. Serializes as a map of its fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct WriterStatus {
    /// Append calls to the store; each is one transaction.
    pub transactions: u64,
    /// Appends that became durable.
    pub appends: u64,
    /// Events that became durable.
    pub events: u64,
    /// Appends refused because of a version conflict.
    pub conflicts: u64,
    /// Appends that failed because the store failed.
    pub failures: u64,
    /// Appends in the queue.
    pub queued: usize,
}

impl Counters {
    pub(super) fn status(&self, queued: usize) -> WriterStatus {
        WriterStatus {
            transactions: self.transactions.load(Ordering::Relaxed),
            appends: self.appends.load(Ordering::Relaxed),
            events: self.events.load(Ordering::Relaxed),
            conflicts: self.conflicts.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            queued,
        }
    }
}
