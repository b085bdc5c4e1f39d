//! The peer table: the present nodes, and the ownership of aggregates and handlers.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;

use crate::command::wire::Kind;
use crate::rate_limit::{LogLimit, RateLimit};

/// Maximum number of nodes in the table. Further nodes are ignored.
const NODES: usize = 1_000;

/// Maximum size of a presence message in bytes; a larger one is not decoded.
pub(super) const BYTES: usize = 64 << 10;

/// Maximum number of aggregates and handlers of a node together.
const ENTRIES: usize = 2_048;

/// Maximum size of the table in bytes.
const ALL_BYTES: usize = 8 << 20;

/// A presence message: a node's announcement of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Presence {
    #[serde(rename = "wire")]
    pub(super) format: u32,
    pub(super) node: String,
    /// New with every start.
    pub(super) incarnation: Uuid,
    /// Id of its event store.
    pub(super) store: Uuid,
    /// Categories of its aggregates.
    pub(super) aggregates: Vec<String>,
    /// Names of its handlers.
    pub(super) handlers: Vec<String>,
    /// Whether the node is shutting down and accepts no more commands.
    #[serde(default)]
    pub(super) draining: bool,
    /// Whether the other nodes should announce themselves at once.
    #[serde(default)]
    pub(super) ask: bool,
    /// Milliseconds since the start of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) clock: Option<u64>,
}

impl Presence {
    /// Returns whether the message is within the limit of entries, so that other nodes store it.
    pub(super) fn fits(&self) -> bool {
        self.aggregates.len() + self.handlers.len() <= ENTRIES
    }

    /// Returns the approximate size of its table entry in bytes.
    fn size(&self) -> usize {
        let names = self.aggregates.iter().chain(&self.handlers);
        let each = |name: &String| name.len() + size_of::<String>();
        size_of::<Peer>() + self.node.len() + names.map(each).sum::<usize>()
    }
}

/// The table of the other nodes, by incarnation.
#[derive(Debug)]
pub(super) struct PeerTable {
    peers: RwLock<Peers>,
    /// Counter of changes.
    news: watch::Sender<u64>,
}

#[derive(Debug)]
struct Peers {
    by_incarnation: HashMap<Uuid, Peer>,
    /// Size of all entries in bytes.
    bytes: usize,
    joined: RateLimit,
    refused: LogLimit,
    /// Time since which this node receives presence. Silence counts from here at the earliest.
    listening: Instant,
}

#[derive(Debug)]
struct Peer {
    presence: Presence,
    size: usize,
    seen: Instant,
}

/// A node that can execute a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) node: String,
    pub(super) incarnation: Uuid,
}

impl PeerTable {
    pub(super) fn new() -> Self {
        let peers = Peers {
            by_incarnation: HashMap::new(),
            bytes: 0,
            joined: RateLimit::new(100, Duration::from_secs(1)),
            refused: LogLimit::each_minute(),
            listening: Instant::now(),
        };
        Self { peers: RwLock::new(peers), news: watch::Sender::new(0) }
    }

    fn read(&self) -> RwLockReadGuard<'_, Peers> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a watch that reports when a node joins or leaves.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Records that this node receives presence from now on, after a connect or reconnect.
    pub(super) fn listening(&self) {
        self.peers.write().unwrap_or_else(PoisonError::into_inner).listening = Instant::now();
    }

    /// Adds or updates a node after its presence message.
    pub(super) fn upsert(&self, presence: Presence) {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let peers = &mut *peers;
        let all = &mut peers.by_incarnation;
        let (now, size) = (Instant::now(), presence.size());
        if let Some(peer) = all.get_mut(&presence.incarnation) {
            peer.seen = now;
            let bytes = peers.bytes - peer.size + size;
            if bytes > ALL_BYTES {
                return refuse(&mut peers.refused, &presence.node);
            }
            let news = peer.presence.draining != presence.draining;
            (peer.presence, peer.size, peers.bytes) = (presence, size, bytes);
            if news {
                self.news.send_modify(|count| *count += 1);
            }
            return;
        }
        // Incarnations are ordered by time. If two have the same name, the later one counts and the
        // earlier one is ignored from then on.
        let same = |peer: &&Peer| peer.presence.node == presence.node;
        if let Some(other) = all.values().find(same).map(|peer| peer.presence.incarnation) {
            if other > presence.incarnation {
                return;
            }
            peers.bytes -= all.remove(&other).map_or(0, |peer| peer.size);
        }
        if all.len() >= NODES || peers.bytes + size > ALL_BYTES {
            return refuse(&mut peers.refused, &presence.node);
        }
        if peers.joined.try_take() {
            tracing::info!(node = presence.node, incarnation = %presence.incarnation, "node joined the command bus");
        }
        peers.bytes += size;
        all.insert(presence.incarnation, Peer { presence, size, seen: now });
        self.news.send_modify(|count| *count += 1);
    }

    /// Removes a node whose subject has no responder. Its next presence message adds it again.
    pub(super) fn remove(&self, incarnation: Uuid) {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.by_incarnation.remove(&incarnation) {
            peers.bytes -= peer.size;
            tracing::info!(node = peer.presence.node, %incarnation, "node left the command bus");
            self.news.send_modify(|count| *count += 1);
        }
    }

    /// Evicts nodes that have been silent for 4 times `silence`.
    pub(super) fn evict_silent(&self, silence: Duration) {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let listening = peers.listening;
        peers.by_incarnation.retain(|_, peer| peer.seen.max(listening).elapsed() < silence * 4);
        peers.bytes = peers.by_incarnation.values().map(|peer| peer.size).sum();
    }

    /// Returns the names of the other nodes, sorted.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            self.read().by_incarnation.values().map(|peer| peer.presence.node.clone()).collect();
        names.sort_unstable();
        names
    }

    /// Returns the nodes that can execute a command, the owner first. `own`: this node, if it can.
    pub(super) fn candidates(
        &self,
        kind: Kind,
        name: &str,
        key: &str,
        own: Option<(&str, Uuid)>,
        silence: Duration,
    ) -> Vec<Candidate> {
        let peers = self.read();
        let mut ranked: Vec<_> = peers.ranked(kind, name, key, own, silence).collect();
        ranked.sort_unstable_by(|one, other| other.cmp(one));
        let candidate =
            |(_, _, node, incarnation): Ranked<'_>| Candidate { node: node.to_owned(), incarnation };
        ranked.into_iter().map(candidate).collect()
    }

    /// Returns the first of the [`candidates`](Self::candidates), and their number.
    pub(super) fn owner(
        &self,
        kind: Kind,
        name: &str,
        key: &str,
        own: Option<(&str, Uuid)>,
        silence: Duration,
    ) -> (Option<Uuid>, usize) {
        let peers = self.read();
        let ranked = peers.ranked(kind, name, key, own, silence);
        let (owner, count) = ranked.fold((None, 0), |(owner, count), one| (owner.max(Some(one)), count + 1));
        (owner.map(|(_, _, _, incarnation)| incarnation), count)
    }
}

fn refuse(limit: &mut LogLimit, node: &str) {
    if let Some(so_far) = limit.count() {
        let (limit, bytes) = (NODES, ALL_BYTES);
        tracing::warn!(node, so_far, limit, bytes, "ignoring nodes beyond the limit");
    }
}

/// A candidate: whether it is live, its weight, its name and its incarnation.
///
/// Silent nodes are candidates of last resort: NATS reports reliably if no node listens there.
type Ranked<'a> = (bool, u64, &'a str, Uuid);

impl Peers {
    fn ranked<'a>(
        &'a self,
        kind: Kind,
        name: &'a str,
        key: &'a str,
        own: Option<(&'a str, Uuid)>,
        silence: Duration,
    ) -> impl Iterator<Item = Ranked<'a>> {
        let able = self.by_incarnation.values().filter(move |peer| {
            let Presence { aggregates, handlers, draining, .. } = &peer.presence;
            let names = if kind == Kind::Aggregate { aggregates } else { handlers };
            !draining && names.iter().any(|other| other == name)
        });
        let others = able.map(move |peer| {
            let alive = peer.seen.max(self.listening).elapsed() < silence;
            (alive, peer.presence.node.as_str(), peer.presence.incarnation)
        });
        let own = own.map(|(node, incarnation)| (true, node, incarnation));
        others.chain(own).map(move |(alive, node, incarnation)| {
            (alive, rendezvous_weight(node, name, key), node, incarnation)
        })
    }
}

/// Computes the rendezvous weight of a node for an aggregate.
///
/// Every node computes the same weight. If a node leaves, only the aggregates that it owned move.
fn rendezvous_weight(node: &str, name: &str, key: &str) -> u64 {
    // FNV-1a over the three texts. The separator byte occurs in none of them.
    let bytes = [node, name, key].into_iter().flat_map(|text| text.bytes().chain([0xff]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    // splitmix64's finalizer follows, because the last bytes of FNV-1a hardly reach the high bits.
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_secs(60);

    fn presence(node: &str) -> Presence {
        Presence {
            format: 1,
            node: node.into(),
            incarnation: Uuid::now_v7(),
            store: Uuid::nil(),
            aggregates: vec!["order".into()],
            handlers: Vec::new(),
            draining: false,
            ask: false,
            clock: None,
        }
    }

    #[test]
    fn the_peer_table_has_a_limit() {
        let table = PeerTable::new();
        let large = |n: usize| {
            let aggregates = (0..1_000).map(|m| format!("{m:0>40}")).collect();
            Presence { aggregates, ..presence(&n.to_string()) }
        };
        (0..500).for_each(|n| table.upsert(large(n)));
        let (nodes, bytes) = (table.names().len(), table.read().bytes);
        assert!(nodes > 50 && bytes <= ALL_BYTES, "{nodes} nodes, {bytes} bytes");
        table.evict_silent(Duration::ZERO);
        assert_eq!((table.names().len(), table.read().bytes), (0, 0));
        table.upsert(presence("small"));
        assert_eq!(table.names(), ["small"]);
    }

    fn owners(table: &PeerTable, own: Option<(&str, Uuid)>) -> Vec<String> {
        let owner = |key: u32| {
            let all = table.candidates(Kind::Aggregate, "order", &key.to_string(), own, SILENCE);
            all.first().map(|candidate| candidate.node.clone()).unwrap_or_default()
        };
        (0..3_000).map(owner).collect()
    }

    #[test]
    fn ownership_is_even_and_moves_only_from_nodes_that_leave() {
        let [a, b, c] = ["a", "b", "c"].map(presence);
        // The views of a and of b.
        let (one, other) = (PeerTable::new(), PeerTable::new());
        [&b, &c].into_iter().for_each(|peer| one.upsert(peer.clone()));
        [&a, &c].into_iter().for_each(|peer| other.upsert(peer.clone()));
        let before = owners(&one, Some(("a", a.incarnation)));
        assert_eq!(before, owners(&other, Some(("b", b.incarnation))));
        for node in ["a", "b", "c"] {
            let share = before.iter().filter(|owner| *owner == node).count();
            assert!((850..1_150).contains(&share), "{node} owns {share} of 3000");
        }
        one.remove(c.incarnation);
        let after = owners(&one, Some(("a", a.incarnation)));
        for (before, after) in before.iter().zip(&after) {
            assert!(before == after || before == "c", "{before} to {after}");
        }
    }

    #[test]
    fn a_later_incarnation_replaces_an_earlier_one_for_good() {
        let table = PeerTable::new();
        let (old, new) = (presence("a"), presence("a"));
        table.upsert(old.clone());
        table.upsert(new.clone());
        table.upsert(old);
        let all = table.candidates(Kind::Aggregate, "order", "1", None, SILENCE);
        assert_eq!(all, [Candidate { node: "a".into(), incarnation: new.incarnation }]);
    }

    #[test]
    fn draining_nodes_are_no_candidates_and_silent_nodes_come_last() {
        let table = PeerTable::new();
        table.upsert(Presence { draining: true, ..presence("a") });
        table.upsert(Presence { aggregates: Vec::new(), handlers: vec!["order".into()], ..presence("b") });
        table.upsert(presence("c"));
        let own = Uuid::now_v7();
        let found = |silence| {
            let all = (0..50).map(|key| {
                let own = Some(("own", own));
                table.candidates(Kind::Aggregate, "order", &key.to_string(), own, silence)
            });
            all.filter(|all| all.len() == 2 && all[0].node == "c").count()
        };
        assert!((1..50).contains(&found(SILENCE)), "{}", found(SILENCE));
        assert_eq!(found(Duration::ZERO), 0);
    }

    #[test]
    fn no_presence_makes_the_reader_panic() {
        let seeds = vec![crate::codec::to_cbor(&presence("a")).unwrap()];
        crate::fuzz::fuzz("a presence", seeds, |bytes| match crate::codec::from_cbor::<Presence>(bytes) {
            Ok(presence) => {
                let table = PeerTable::new();
                table.upsert(presence);
                let (owner, nodes) = table.owner(Kind::Aggregate, "order", "1", None, SILENCE);
                format!("{nodes} nodes, owned: {}", owner.is_some())
            }
            Err(error) => error,
        });
    }
}
