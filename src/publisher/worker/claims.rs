//! Determines the end of a log stream that the log confirms.
//!
//! Messages describe themselves, and another program may have published them.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};

use uuid::Uuid;

use super::interruption::Interruption;
use crate::bus::{Claim, ClaimedEvent};
use crate::event::Position;
use crate::store::{EventStore, ReadLog, StoreError};

/// Number of events per read of the log.
const EVENTS: usize = 2_048;

/// Maximum number of missing messages that count as possible events.
const MISSING: usize = 65_536;

/// A comparison of messages with the log, from a position on.
pub(super) struct Walk<'a> {
    store: &'a dyn EventStore,
    /// Last position that the log has confirmed.
    pub(super) position: Position,
    /// Whether no message is missing since then.
    pub(super) is_exact: bool,
    /// Number of messages that are not events of the log, or not at their position in the log.
    pub(super) foreign: u64,
    /// Messages that continue after the confirmed ones with events that the log does not have.
    pub(super) lost: Option<Lost>,
    /// Number of missing messages since the last confirmed message.
    missing: usize,
    /// Events of the log after `position`.
    next: VecDeque<(Position, Uuid)>,
    /// Position up to which the log was read.
    read_to: Position,
    /// Whether the last read reached the end of the log.
    ended: bool,
}

/// The last of the messages that the log does not have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lost {
    /// Sequence number of the first such message.
    pub(super) first: u64,
    pub(super) position: Position,
    pub(super) id: Uuid,
    /// Number of such messages.
    count: u64,
}

impl<'a> Walk<'a> {
    pub(super) fn new(store: &'a dyn EventStore, position: Position, is_exact: bool) -> Self {
        let next = VecDeque::new();
        let (read_to, lost) = (position, None);
        Self { store, position, is_exact, foreign: 0, lost, missing: 0, next, read_to, ended: false }
    }

    /// Compares the next message. Only the exact next event of the log moves the end.
    pub(super) async fn take(&mut self, claim: Claim) -> Result<(), Interruption> {
        match claim.event {
            ClaimedEvent::Missing => {
                self.missing += 1;
                self.is_exact = false;
                return Ok(());
            }
            ClaimedEvent::Event { previous, position, id } if position > self.position => {
                if self.is_next(position, id).await? {
                    self.foreign += self.lost.take().map_or(0, |lost| lost.count);
                    (self.position, self.missing, self.is_exact) = (position, 0, true);
                    return Ok(());
                }
                let end = self.lost.map_or(self.position, |lost| lost.position);
                if previous == end && position > end {
                    if self.store.event_id_at(position).await? != Some(id) {
                        let (first, count) =
                            self.lost.map_or((claim.sequence, 0), |lost| (lost.first, lost.count));
                        self.lost = Some(Lost { first, position, id, count: count + 1 });
                        return Ok(());
                    }
                    // Another process published the event: the high-water mark of this process is
                    // still lower.
                    if self.ended && position > self.read_to {
                        return Err(Interruption::Unstable { position });
                    }
                }
            }
            ClaimedEvent::Event { .. } | ClaimedEvent::Foreign => {}
        }
        self.foreign += 1;
        Ok(())
    }

    /// Number of messages that do not belong to the log stream, if the log has lost nothing.
    pub(super) fn ignored(&self) -> u64 {
        self.foreign + self.lost.map_or(0, |lost| lost.count)
    }

    /// Whether the log has this event next.
    /// As many other events may precede it as messages are missing.
    async fn is_next(&mut self, position: Position, id: Uuid) -> Result<bool, StoreError> {
        let reach = self.missing.min(MISSING) + 1;
        while self.next.len() < reach && position > self.read_to && !self.ended {
            let page = self.store.read_log(ReadLog::after(self.read_to).limit(EVENTS)).await?;
            self.ended = !page.has_more();
            self.read_to = page.scanned_to.max(self.read_to);
            self.next.extend(page.events.iter().map(|event| (event.position, event.id)));
        }
        let found = self.next.iter().take(reach).position(|next| *next == (position, id));
        if let Some(index) = found {
            self.next.drain(..=index);
        }
        Ok(found.is_some())
    }
}

/// Finds the end among the last messages if no checkpoint states it. Returns the index.
///
/// A run is a series of events that follow each other without a gap, in the log stream and in the
/// log. The end is the last event of the longest run.
pub(super) async fn find_end(store: &dyn EventStore, claims: &[Claim]) -> Result<Option<usize>, StoreError> {
    let mut runs = HashMap::<Position, usize>::new();
    let mut best = None;
    for (index, claim) in claims.iter().enumerate() {
        let ClaimedEvent::Event { previous, position, id } = claim.event else { continue };
        if position <= previous || !follows(store, previous, position, id).await? {
            continue;
        }
        let length = 1 + runs.get(&previous).copied().unwrap_or_default();
        let run = runs.entry(position).or_default();
        *run = length.max(*run);
        // If two runs are equally long, take the earlier end: a duplicate event does less harm
        // than a missing event.
        best = best.max(Some((length, Reverse(position), index)));
    }
    Ok(best.map(|(_, _, index)| index))
}

/// Whether the log has this event, with `previous` directly before it.
async fn follows(
    store: &dyn EventStore,
    previous: Position,
    position: Position,
    id: Uuid,
) -> Result<bool, StoreError> {
    let read = ReadLog::after(previous).upto(position).limit(1);
    match store.read_log(read).await?.events.first() {
        Some(event) => Ok(event.position == position && event.id == id),
        // The event is above the high-water mark of this process.
        None => Ok(store.event_id_at(position).await? == Some(id)),
    }
}
