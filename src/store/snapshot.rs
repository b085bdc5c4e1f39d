//! The snapshot of a stream: a folded state.

use bytes::Bytes;

use crate::event::Version;

/// The revision of the structure of a state, chosen by the program.
///
/// Increase it with every change of the type or of the fold: a snapshot of another revision is
/// ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotRevision(pub u32);

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
