use std::collections::HashMap;

use super::append::{Append, Appended, Conflict};
use crate::event::{Position, StreamId, Version};

/// What an append is decided against, and what the appends before it in the same batch have already taken. Back ends that
/// give out positions themselves share it, so that they cannot disagree.
#[derive(Debug, Clone)]
pub(super) struct Decider {
    /// The versions of every stream that the batch names; a stream that is not here has no events.
    versions: HashMap<StreamId, Version>,
    /// The last position given out.
    last: Position,
}

impl Decider {
    pub(super) fn new(versions: HashMap<StreamId, Version>, last: Position) -> Self {
        Self { versions, last }
    }

    fn version(&self, stream: &StreamId) -> Version {
        self.versions.get(stream).copied().unwrap_or(Version::NONE)
    }

    /// Whether `append` may happen, without taking anything.
    pub(super) fn check(&self, append: &Append) -> Result<(), Conflict> {
        for part in &append.streams {
            let actual = self.version(&part.stream);
            if !part.expected.allows(actual) {
                return Err(Conflict { stream: part.stream.clone(), expected: part.expected, actual });
            }
        }
        Ok(())
    }

    /// Gives an append that passed [`check`](Self::check) its versions and positions.
    pub(super) fn take(&mut self, append: &Append) -> Appended {
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
