//! The state of a publisher term.

use std::ops::Range;

use crate::bus::{Claim, LogStreamEnd};

/// State of one publisher term: the end found, and the progress since.
pub(super) struct Turn {
    /// Connection session in which the end was read.
    /// Another session may reach another server, or a server that has lost messages.
    pub(super) session: u64,
    pub(super) end: LogStreamEnd,
    /// Messages that the log has to confirm.
    pub(super) unread: Unread,
    /// Message size limit of the stream, if it has one.
    pub(super) largest: usize,
    /// Whether the publisher is probing.
    /// The messages before the end are gone, so the next events may have been among them.
    /// They are published one by one until the server stores the first new event.
    pub(super) probing: bool,
}

/// Messages after the one of the checkpoint, or the last messages.
pub(super) struct Unread {
    /// Messages already read.
    pub(super) read: Vec<Claim>,
    /// Sequence number of the first message that the stream keeps.
    pub(super) first: u64,
    /// Sequence numbers of the messages to read.
    pub(super) sequences: Range<u64>,
}

impl Unread {
    pub(super) fn none() -> Self {
        Self { read: Vec::new(), first: 1, sequences: 0..0 }
    }
}
