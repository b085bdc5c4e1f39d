//! Transit times of messages from other nodes, independent of clock skew.
//!
//! Every node counts milliseconds since its own start. The fastest presence message of a node has
//! the smallest difference between its count and this node's count. A larger difference of a
//! command shows how much longer the command took.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::command::wire::Sent;

/// Maximum number of nodes. At the limit, a new node replaces the one that was silent for longest.
const NODES: usize = 1_000;

/// The differences between the clocks of other nodes and this node's clock.
#[derive(Debug, Default)]
pub(super) struct PeerClocks(Mutex<HashMap<Uuid, Differences>>);

/// The clock differences of one node, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Differences {
    /// Smallest difference in this period, and in the previous period.
    current: i128,
    previous: i128,
    /// Start of the period, and time of the last message, on this node's clock.
    began: u64,
    seen: u64,
}

fn difference(sent: u64, now: u64) -> i128 {
    i128::from(now) - i128::from(sent)
}

impl PeerClocks {
    fn nodes(&self) -> MutexGuard<'_, HashMap<Uuid, Differences>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a presence message.
    ///
    /// A `period` is in milliseconds. Older messages count until the end of the next period: after
    /// a pause of this process, many late messages arrive at once.
    pub(super) fn observe(&self, sent: Sent, now: u64, period: u64) {
        let mut nodes = self.nodes();
        let found = difference(sent.clock, now);
        if let Some(known) = nodes.get_mut(&sent.node) {
            known.seen = now;
            if now.saturating_sub(known.began) < period {
                known.current = known.current.min(found);
            } else {
                (known.previous, known.current, known.began) = (known.current, found, now);
            }
            return;
        }
        if nodes.len() >= NODES {
            let silent = nodes.iter().min_by_key(|(_, known)| known.seen).map(|(node, _)| *node);
            silent.and_then(|node| nodes.remove(&node));
        }
        nodes.insert(sent.node, Differences { current: found, previous: found, began: now, seen: now });
    }

    /// Returns how much longer a message took than the fastest one. Zero for an unknown node.
    pub(super) fn delay(&self, sent: Sent, now: u64) -> std::time::Duration {
        let quickest = self.nodes().get(&sent.node).map(|known| known.current.min(known.previous));
        let delay = quickest.map_or(0, |quickest| difference(sent.clock, now) - quickest);
        std::time::Duration::from_millis(u64::try_from(delay.max(0)).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_late_message_is_noticed_whatever_the_clocks_say() {
        let (clocks, node) = (PeerClocks::default(), Uuid::now_v7());
        let sent = |clock| Sent { node, clock };
        for skew in [0, 15_000, u64::MAX / 2] {
            // The fastest message took 3 ms.
            for (at, took) in [(0, 5), (1_000, 3), (2_000, 40)] {
                clocks.observe(sent(skew + at), at + took, 10_000);
            }
            assert_eq!(clocks.delay(sent(skew + 3_000), 3_010), Duration::from_millis(7));
            // During a pause of 60 s, presences and a command queue up. The command is late.
            (3..63).for_each(|beat| clocks.observe(sent(skew + beat * 1_000), 63_000, 10_000));
            assert_eq!(clocks.delay(sent(skew + 4_000), 63_000), Duration::from_millis(58_997));
            clocks.nodes().clear();
        }
        assert_eq!(clocks.delay(sent(1), u64::MAX), Duration::ZERO, "an unknown node");
        (0..2 * NODES as u64).for_each(|n| clocks.observe(Sent { node: Uuid::now_v7(), clock: 0 }, n, 1));
        assert_eq!(clocks.nodes().len(), NODES);
    }
}
