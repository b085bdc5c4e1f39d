//! How long messages of other nodes take, without comparing two clocks.
//!
//! Every node counts milliseconds since its own start. The smallest difference between its count and ours, over its presence
//! messages, is that of the quickest message; a command with a larger one was on its way for longer.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::command::wire::Sent;

/// How many nodes are remembered; the one that was silent for longest goes first.
const NODES: usize = 1_000;

/// The differences between other nodes' clocks and ours.
#[derive(Debug, Default)]
pub(super) struct PeerClocks(Mutex<HashMap<Uuid, Differences>>);

/// Of one node, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Differences {
    /// The smallest one in this period, and in the one before.
    current: i128,
    previous: i128,
    /// Begin of the period, and the last message, on our clock.
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

    /// Takes note of a presence message. After a `period` (milliseconds) old messages no longer count, but one: after a
    /// pause of this process many late ones come at once.
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

    /// How much longer than the quickest message this one took; nothing if the node is not known.
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
            // The quickest took 3 ms.
            for (at, took) in [(0, 5), (1_000, 3), (2_000, 40)] {
                clocks.observe(sent(skew + at), at + took, 10_000);
            }
            assert_eq!(clocks.delay(sent(skew + 3_000), 3_010), Duration::from_millis(7));
            // A pause of 60 s: late presences come first, and the command between them is late.
            (3..63).for_each(|beat| clocks.observe(sent(skew + beat * 1_000), 63_000, 10_000));
            assert_eq!(clocks.delay(sent(skew + 4_000), 63_000), Duration::from_millis(58_997));
            clocks.nodes().clear();
        }
        assert_eq!(clocks.delay(sent(1), u64::MAX), Duration::ZERO, "an unknown node");
        (0..2 * NODES as u64).for_each(|n| clocks.observe(Sent { node: Uuid::now_v7(), clock: 0 }, n, 1));
        assert_eq!(clocks.nodes().len(), NODES);
    }
}
