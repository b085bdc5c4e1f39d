use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// A lease that one holds.
///
/// Leases avoid waste, they do not give safety (I7): whatever an owner writes must also be guarded by data, as checkpoints
/// are by their epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// What is owned.
    pub name: String,
    /// By whom: a node.
    pub owner: Uuid,
    /// Which ownership this is; grows with every new owner, starts at 1.
    pub epoch: u64,
}

/// A lease as the store has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseInfo {
    /// The last owner and its epoch.
    pub lease: Lease,
    /// Until when, by the store's clock.
    pub expires_at: DateTime<Utc>,
    /// The TTL that its holder has asked for last.
    pub ttl: Duration,
    /// Whether `expires_at` was still ahead when the store was asked, by the store's own clock: otherwise it is free.
    pub live: bool,
}
