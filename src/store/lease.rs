use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// A lease held by this process.
///
/// Leases save work; they do not provide safety (I7). All writes of a lease holder must also be
/// guarded by data, as checkpoints are by their epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Name of the leased resource.
    pub name: String,
    /// Node that holds the lease.
    pub owner: Uuid,
    /// Fencing token: starts at 1 and grows with every new owner.
    pub epoch: u64,
}

/// A lease as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseInfo {
    /// Last owner and its epoch.
    pub lease: Lease,
    /// Time of expiry, by the store's clock.
    pub expires_at: DateTime<Utc>,
    /// Time to live of the holder's last request.
    pub ttl: Duration,
    /// Whether `expires_at` was in the future when it was read, by the store's clock. If not, it is
    /// free.
    pub live: bool,
}
