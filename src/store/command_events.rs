use crate::event::{Position, Version};

/// The range of a command's events in one stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandEvents {
    /// Version of the first event.
    pub first: Version,
    /// Version of the last event.
    pub last: Version,
    /// Position of the last event in the log.
    pub position: Position,
}
