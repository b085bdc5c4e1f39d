//! Operators' control of a projection, as its task knows it: the pause, changes, requests.

use std::mem::replace;

use tokio::time::Instant;

/// The pause, the changes of any node, and the requests that are due.
#[derive(Debug)]
pub(super) struct Operators {
    pub(super) pause: Pause,
    /// Time of the last pause or resume call: earlier lease views are older than that.
    pub(super) paused_at: Option<Instant>,
    pub(super) changes: Changes,
    /// Requests for a reset or a rebuild.
    pub(super) requests: Due,
    /// Requests to retry parked events.
    pub(super) retries: Due,
}

/// The persisted pause at the last check; nothing is applied before it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pause {
    Unknown,
    Running,
    Paused,
}

/// Changes of the shared state of a projection.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Whether a node makes a change; nothing is applied meanwhile.
    pub(super) in_progress: bool,
    /// Number of changes in the last lease view; `None` before the first one.
    seen: Option<u64>,
    /// Numbers of this task's own changes that it has not processed yet.
    pub(super) own: Vec<u64>,
}

/// Changes since the last lease view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NewChanges {
    None,
    /// Changes of this task, or a change that its node did not count.
    Own,
    /// Changes of other nodes, too: there may be new operator requests.
    Foreign,
}

/// Earliest time of the next attempt at work that may be due; `None` if there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Due(pub(super) Option<Instant>);

impl Operators {
    pub(super) fn new() -> Self {
        let due = Due(Some(Instant::now()));
        Self {
            pause: Pause::Unknown,
            paused_at: None,
            changes: Changes::default(),
            requests: due,
            retries: due,
        }
    }

    /// There may be new requests.
    pub(super) fn request_now(&mut self) {
        let now = Due(Some(Instant::now()));
        (self.requests, self.retries) = (now, now);
    }

    /// There may be requests; an attempt that was put off stays put off.
    pub(super) fn expect_requests(&mut self) {
        for Due(at) in [&mut self.requests, &mut self.retries] {
            at.get_or_insert_with(Instant::now);
        }
    }
}

impl From<bool> for Pause {
    fn from(paused: bool) -> Self {
        if paused { Self::Paused } else { Self::Running }
    }
}

impl Changes {
    /// Processes the number of changes in a lease view, and whether one is in progress.
    pub(super) fn observe(&mut self, in_progress: bool, changes: u64) -> NewChanges {
        // A node that dies after its change does not count it.
        let ended = replace(&mut self.in_progress, in_progress) && !in_progress;
        let own = self.own.extract_if(.., |change| *change <= changes).count() as u64;
        let new = self.seen.replace(changes).map_or(0, |seen| changes.saturating_sub(seen));
        match new {
            _ if new > own => NewChanges::Foreign,
            _ if new > 0 || ended => NewChanges::Own,
            _ => NewChanges::None,
        }
    }
}

impl Due {
    pub(super) fn is_due(self) -> bool {
        self.0.is_some_and(|at| at <= Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn changes_of_other_nodes_and_own_ones_are_distinguished() {
        let mut changes = Changes::default();
        // The first view is the state at the start.
        assert_eq!(changes.observe(false, 7), NewChanges::None);
        changes.own.push(8);
        // An older view does not consume the own change.
        assert_eq!(changes.observe(false, 7), NewChanges::None);
        assert_eq!(changes.observe(false, 8), NewChanges::Own);
        assert_eq!(changes.observe(false, 9), NewChanges::Foreign);
        changes.own.push(10);
        assert_eq!(changes.observe(false, 11), NewChanges::Foreign);
        // A view from before the last one.
        assert_eq!(changes.observe(false, 10), NewChanges::None);
    }

    #[test]
    fn the_end_of_an_uncounted_change_is_noticed() {
        let mut changes = Changes::default();
        assert_eq!(changes.observe(true, 1), NewChanges::None);
        assert!(changes.in_progress);
        assert_eq!(changes.observe(true, 1), NewChanges::None);
        assert_eq!(changes.observe(false, 1), NewChanges::Own);
        assert!(!changes.in_progress);
        changes.in_progress = true;
        assert_eq!(changes.observe(false, 1), NewChanges::Own);
    }

    #[test]
    fn requests_that_were_put_off_wait_until_another_node_makes_a_change() {
        let mut operators = Operators::new();
        assert!(operators.requests.is_due() && operators.retries.is_due());
        operators.requests = Due(None);
        operators.retries = Due(Some(Instant::now() + Duration::from_secs(60)));
        assert!(!operators.requests.is_due() && !operators.retries.is_due());
        operators.expect_requests();
        assert!(operators.requests.is_due() && !operators.retries.is_due());
        operators.request_now();
        assert!(operators.retries.is_due());
    }
}
