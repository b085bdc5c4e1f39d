//! Leases in memory.
//!
//! They use the machine's clock: a test that moves the clock of the store ends no lease.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::lease::{Lease, LeaseInfo};
use crate::time::later;

/// The leases of a store in memory, by name.
#[derive(Debug, Default)]
pub(super) struct MemoryLeases {
    leases: BTreeMap<String, LeaseInfo>,
}

impl MemoryLeases {
    pub(super) fn acquire(&mut self, name: &str, owner: Uuid, ttl: Duration) -> Option<Lease> {
        let now = Utc::now();
        let epoch = match self.leases.get(name) {
            None => 1,
            Some(info) if info.lease.owner == owner => info.lease.epoch,
            Some(info) if info.expires_at <= now => info.lease.epoch + 1,
            Some(_) => return None,
        };
        let lease = Lease { name: name.to_owned(), owner, epoch };
        let info = LeaseInfo { lease: lease.clone(), expires_at: later(now, ttl), ttl, live: true };
        self.leases.insert(name.to_owned(), info);
        Some(lease)
    }

    pub(super) fn take_over(&mut self, seen: &LeaseInfo, owner: Uuid, ttl: Duration) -> Option<Lease> {
        let info = self.leases.get_mut(&seen.lease.name)?;
        if info.lease.epoch != seen.lease.epoch || info.expires_at != seen.expires_at {
            return None;
        }
        info.lease.epoch += u64::from(info.lease.owner != owner);
        info.lease.owner = owner;
        info.expires_at = later(Utc::now(), ttl);
        info.ttl = ttl;
        Some(info.lease.clone())
    }

    pub(super) fn renew(&mut self, lease: &Lease, ttl: Duration) -> bool {
        let Some(info) = self.held(lease) else { return false };
        info.expires_at = later(Utc::now(), ttl);
        info.ttl = ttl;
        true
    }

    pub(super) fn release(&mut self, lease: &Lease) {
        if let Some(info) = self.held(lease) {
            info.expires_at = DateTime::UNIX_EPOCH;
        }
    }

    /// Returns whether the stored lease has this owner and epoch.
    pub(super) fn is_current(&self, lease: &Lease) -> bool {
        self.leases.get(&lease.name).is_some_and(|info| info.lease == *lease)
    }

    pub(super) fn list(&self) -> Vec<LeaseInfo> {
        let now = Utc::now();
        let info = |info: &LeaseInfo| LeaseInfo { live: info.expires_at > now, ..info.clone() };
        self.leases.values().map(info).collect()
    }

    /// Returns the stored lease, if `lease` is still current and was not released.
    fn held(&mut self, lease: &Lease) -> Option<&mut LeaseInfo> {
        self.leases
            .get_mut(&lease.name)
            .filter(|info| info.lease == *lease && info.expires_at > DateTime::UNIX_EPOCH)
    }
}
