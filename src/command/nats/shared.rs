//! The state that all tasks of the node share.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::clocks::PeerClocks;
use super::cluster_link::ClusterLink;
use super::peer_table::PeerTable;
use super::pending_replies::PendingReplies;
use crate::command::hooks::CommandHooks;
use crate::command::registry::Registry;

/// The shared state of all tasks of the node.
pub(super) struct Shared {
    /// Aggregates and handlers of this node. The dispatcher owns them, so this reference is weak.
    pub(super) registry: Weak<Registry>,
    pub(super) hooks: CommandHooks,
    pub(super) subjects: Subjects,
    /// New with every start.
    pub(super) incarnation: Uuid,
    pub(super) store: Uuid,
    /// Name of the node.
    pub(super) name: String,
    pub(super) beat: Duration,
    pub(super) table: PeerTable,
    pub(super) clocks: PeerClocks,
    /// Time at which this node's clock was 0.
    pub(super) started: Instant,
    /// Commands of this node in flight to other nodes.
    pub(super) calls: PendingReplies,
    /// Permits for commands of other nodes, and their number.
    pub(super) permits: Arc<Semaphore>,
    pub(super) limit: usize,
    pub(super) link: watch::Sender<ClusterLink>,
    pub(super) draining: watch::Sender<bool>,
    /// Set after the end of the node. No further reply is sent or received.
    pub(super) ended: AtomicBool,
}

/// The subjects of the command bus.
pub(super) struct Subjects {
    pub(super) namespace: String,
}

impl Subjects {
    pub(super) fn presence(&self) -> String {
        format!("{}.commands.presence", self.namespace)
    }

    pub(super) fn node(&self, incarnation: Uuid) -> String {
        format!("{}.commands.node.{incarnation}", self.namespace)
    }
}

impl Shared {
    /// Returns the time after which a silent node counts as lost: 3.5 heartbeats.
    pub(super) fn silence(&self) -> Duration {
        self.beat * 7 / 2
    }

    /// Returns the milliseconds since this node's start.
    pub(super) fn clock(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
