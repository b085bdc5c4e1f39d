use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

/// A lease held by this process.
///
/// Leases save work; they do not provide safety (I7). All writes of a lease holder must also be
/// guarded by data, as checkpoints are by their epoch. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lease {
    /// Name of the leased resource.
    pub name: String,
    /// Node that holds the lease.
    pub owner: Uuid,
    /// Fencing token: starts at 1 and grows with every new owner.
    pub epoch: u64,
}

/// A lease as stored.
///
/// Serializes as a map of its fields, with `ttl_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeaseInfo {
    /// Last owner and its epoch.
    pub lease: Lease,
    /// Time of expiry, by the store's clock.
    pub expires_at: DateTime<Utc>,
    /// Time to live of the holder's last request.
    #[serde(rename = "ttl_seconds", serialize_with = "crate::serde_forms::seconds")]
    pub ttl: Duration,
    /// Whether `expires_at` was in the future when it was read, by the store's clock. If not, it is
    /// free.
    pub live: bool,
}
