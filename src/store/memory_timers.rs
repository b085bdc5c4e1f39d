//! Timers in memory.

use std::collections::BTreeMap;

use super::error::StoreError;
use super::memory_clock::MemoryClock;
use super::timer::{
    DueTimers, LISTING, NewTimer, READING_DUE, StoredTimer, TimerRef, check_read, is_repeatable, replaces,
    timer_changes,
};

/// The timers of a store in memory, with the checks of the databases.
#[derive(Debug, Default)]
pub(super) struct MemoryTimers {
    clock: MemoryClock,
    /// Timers by process, instance and name.
    timers: BTreeMap<(String, String, String), StoredTimer>,
}

impl MemoryTimers {
    pub(super) fn new(clock: MemoryClock) -> Self {
        Self { clock, ..Self::default() }
    }

    pub(super) fn write(
        &mut self,
        process: &str,
        put: Vec<NewTimer>,
        remove: Vec<TimerRef>,
    ) -> Result<(), StoreError> {
        let now = self.clock.now();
        for ((instance, name), change) in timer_changes(process, put, remove)? {
            let key = (process.to_owned(), instance.clone(), name.clone());
            let stored = self.timers.get(&key).map(|timer| timer.version);
            let stored = stored.filter(|stored| change.removed.is_none_or(|removed| *stored > removed));
            if stored.is_none() {
                self.timers.remove(&key);
            }
            if let Some((version, due)) = change.put
                && stored.is_none_or(|stored| replaces(version, stored, is_repeatable(&name)))
            {
                let due_at = due.time(now);
                let process = process.to_owned();
                self.timers.insert(key, StoredTimer { process, instance, name, version, due_at });
            }
        }
        Ok(())
    }

    pub(super) fn due(&self, process: &str, limit: usize) -> Result<DueTimers, StoreError> {
        check_read(READING_DUE, Some(process), limit)?;
        Ok(DueTimers::divide(self.sorted(Some(process), |_| true), self.clock.now(), limit))
    }

    pub(super) fn list(
        &self,
        process: Option<&str>,
        after: Option<&StoredTimer>,
        limit: usize,
    ) -> Result<Vec<StoredTimer>, StoreError> {
        check_read(LISTING, process, limit)?;
        let mut timers =
            self.sorted(process, |timer| after.is_none_or(|after| timer.order() > after.order()));
        timers.truncate(limit);
        Ok(timers)
    }

    /// Returns the timers of a process, or of all, in the order in which they are listed.
    fn sorted(&self, process: Option<&str>, select: impl Fn(&StoredTimer) -> bool) -> Vec<StoredTimer> {
        let of = |timer: &&StoredTimer| process.is_none_or(|process| timer.process == process);
        let mut timers: Vec<_> =
            self.timers.values().filter(of).filter(|timer| select(timer)).cloned().collect();
        timers.sort_unstable_by(|a, b| a.order().cmp(&b.order()));
        timers
    }
}
