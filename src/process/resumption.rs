//! The timer that resumes an instance: work is left that no event and no other timer causes.

use std::time::Duration;

use crate::event::Version;
use crate::store::{DueTime, NewTimer};

/// Maximum time after which work that is left is resumed.
const RESUME_AFTER: Duration = Duration::from_secs(5);

/// Returns the wait of the resumptions of a process whose lease is valid for `lease`.
///
/// Not longer than the lease, so that another node that takes over finds them due.
pub(super) fn resume_after(lease: Duration) -> Duration {
    lease.min(RESUME_AFTER)
}

/// Returns the timer that resumes an instance, which has work to do at a version of its stream.
pub(super) fn resumption(instance: String, version: Version, wait: Duration) -> NewTimer {
    NewTimer { instance, name: String::new(), version, due: DueTime::After(wait) }
}
