//! The connection to the other nodes, as senders of commands see it.

use std::sync::Arc;

use crate::bus::CommandConnection;

/// The state of the connection for senders of commands.
#[derive(Debug, Clone)]
pub(super) enum ClusterLink {
    Down {
        reason: String,
    },
    Up {
        connection: CommandConnection,
        /// Prefix of the reply subjects.
        inbox: Arc<str>,
        /// Connection generation. Replies of an earlier generation may be lost.
        session: u64,
        /// Knowledge about the other nodes.
        others: PeerDiscovery,
    },
}

/// The knowledge about the other nodes since the connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PeerDiscovery {
    /// This node has requested their presence.
    Asked,
    /// The usual time for their answers is over.
    Greeted,
    /// All present nodes have announced themselves.
    Known,
}

impl ClusterLink {
    /// Returns whether commands to other nodes are likely to find them.
    pub(super) fn is_settled(&self) -> bool {
        matches!(self, ClusterLink::Up { others: PeerDiscovery::Greeted | PeerDiscovery::Known, .. })
    }

    /// Returns the connection generation, or `None` while the connection is down.
    pub(super) fn session(&self) -> Option<u64> {
        match self {
            ClusterLink::Up { session, .. } => Some(*session),
            ClusterLink::Down { .. } => None,
        }
    }
}
