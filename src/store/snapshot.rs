//! The snapshot of a stream: a folded state.

use bytes::Bytes;

use crate::event::Version;

/// A folded state, from which a long stream is loaded without reading it from the start.
///
/// Snapshots are a cache: losing one loses no data.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Version of the last event folded into the state.
    pub version: Version,
    /// Schema revision of the state; readers ignore a snapshot of another revision.
    pub revision: u32,
    /// Encoded state.
    pub state: Bytes,
}
