use std::collections::HashMap;

use super::append::{Append, Appended, Conflict};
use crate::event::{Position, StreamId, Version};

/// The stream versions and the position that the next append of a batch is decided on.
///
/// All back ends that assign positions themselves share it, so their decisions agree.
#[derive(Debug)]
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

    /// Checks the expected versions of `append`, and assigns its versions and positions.
    pub(super) fn assign(&mut self, append: &Append) -> Result<Appended, Conflict> {
        let mut versions = Vec::with_capacity(append.streams.len());
        for part in &append.streams {
            let actual = self.versions.get(&part.stream).copied().unwrap_or(Version::NONE);
            if !part.expected.allows(actual) {
                let (stream, expected) = (part.stream.clone(), part.expected);
                return Err(Conflict { stream, expected, actual: Some(actual) });
            }
            versions.push(actual.plus(part.events.len() as u64));
        }
        let events = append.streams.iter().map(|part| part.events.len() as u64).sum();
        let before = self.last.get();
        self.last = Position::new(before + events);
        Ok(Appended { versions, positions: (1..=events).map(|n| Position::new(before + n)).collect() })
    }
}
