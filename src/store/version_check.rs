use std::collections::HashMap;

use super::append::{Append, Appended, Conflict};
use crate::event::{Position, StreamId, Version};

/// The stream versions and the position that the next append of a batch is decided on.
///
/// All back ends that assign positions themselves share it, so their decisions agree.
#[derive(Debug, Clone)]
pub(super) struct StreamVersions {
    /// Versions of all streams in the batch; a stream without an entry has no events.
    versions: HashMap<StreamId, Version>,
    /// Last assigned position.
    last: Position,
}

impl StreamVersions {
    pub(super) fn new(versions: HashMap<StreamId, Version>, last: Position) -> Self {
        Self { versions, last }
    }

    fn version(&self, stream: &StreamId) -> Version {
        self.versions.get(stream).copied().unwrap_or(Version::NONE)
    }

    /// Checks the expected versions of `append` without changing anything.
    pub(super) fn check(&self, append: &Append) -> Result<(), Conflict> {
        for part in &append.streams {
            let actual = self.version(&part.stream);
            if !part.expected.allows(actual) {
                let (stream, expected) = (part.stream.clone(), part.expected);
                return Err(Conflict { stream, expected, actual: Some(actual) });
            }
        }
        Ok(())
    }

    /// Assigns versions and positions to an append that passed [`check`](Self::check).
    pub(super) fn assign(&mut self, append: &Append) -> Appended {
        let mut versions = Vec::with_capacity(append.streams.len());
        let mut positions = Vec::new();
        for part in &append.streams {
            let version = self.version(&part.stream).plus(part.events.len() as u64);
            self.versions.insert(part.stream.clone(), version);
            versions.push(version);
            for _ in &part.events {
                self.last = Position::new(self.last.get() + 1);
                positions.push(self.last);
            }
        }
        Appended { versions, positions }
    }
}
