//! Comparison of the mirror with the log.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use storied::bus::{MirrorItem, MirrorReader};
use storied::{EventStore, NatsBus, Position, RecordedEvent};
use tokio::time::{Instant, sleep};

use super::Problems;
use crate::failure::Failure;

/// Poll interval of the mirror.
const POLL: Duration = Duration::from_millis(100);

pub(crate) struct Mirror {
    reader: MirrorReader,
    store: Arc<dyn EventStore>,
    /// The next message, if it was read and is not compared yet.
    next: Option<MirrorItem>,
    /// Time limit for the mirror to progress.
    deadline: Instant,
    /// Position of its first event.
    first: Option<Position>,
    last: Position,
    compared: u64,
    /// Number of events before its first one: removed by its limits, or never published to it.
    before: u64,
    /// Number of events of the log that are not in the mirror yet.
    behind: u64,
}

impl Mirror {
    pub(crate) async fn open(
        bus: &NatsBus,
        store: Arc<dyn EventStore>,
        within: Duration,
    ) -> Result<Self, Failure> {
        let reader = bus.read_mirror(store.info().id).await?;
        Ok(Self {
            reader,
            store,
            next: None,
            deadline: Instant::now() + within,
            first: None,
            last: Position::START,
            compared: 0,
            before: 0,
            behind: 0,
        })
    }

    /// Returns the next message with a position in the log, within the time limit.
    ///
    /// Reports others as problems.
    async fn peek(&mut self, problems: &mut Problems, wait: bool) -> Result<Option<&MirrorItem>, Failure> {
        while self.next.is_none() {
            match self.reader.next().await? {
                Some(MirrorItem::Missing { sequence }) => {
                    problems.add(format!("mirror: message {sequence} was deleted"));
                }
                Some(MirrorItem::Foreign { sequence, what }) => {
                    problems.add(format!("mirror: message {sequence} is not of this log: {what}"));
                }
                Some(item) => self.next = Some(item),
                None if wait && Instant::now() < self.deadline => sleep(POLL).await,
                None => break,
            }
        }
        Ok(self.next.as_ref())
    }

    /// Compares the next event of the log, which follows `previous`.
    pub(crate) async fn check(
        &mut self,
        event: &RecordedEvent,
        previous: Position,
        problems: &mut Problems,
    ) -> Result<(), Failure> {
        loop {
            let wait = self.behind == 0 && self.is_to_come(event.position).await?;
            let Some(item) = self.peek(problems, wait).await? else {
                self.behind += 1;
                return Ok(());
            };
            let place = place(item);
            if place > event.position {
                if self.first.is_none() {
                    self.before += 1;
                } else {
                    problems.add(format!("mirror: the event at position {} is missing", event.position));
                }
                return Ok(());
            }
            let Some(item) = self.next.take() else { return Ok(()) };
            if place <= self.last && self.first.is_some() {
                problems.add(again(&item));
                continue;
            }
            if place < event.position {
                problems.add(format!("mirror: has an event at position {place}, where the log has none"));
                continue;
            }
            self.compare(event, previous, &item, problems);
            return Ok(());
        }
    }

    /// Returns whether the mirror may still get an event; false if its limits have removed it.
    async fn is_to_come(&self, position: Position) -> Result<bool, Failure> {
        if self.first.is_some() || self.next.is_some() {
            return Ok(true);
        }
        let known = self.store.checkpoint("publisher").await?;
        Ok(known.mark == 0 || known.mark < self.reader.last_sequence() || known.position < position)
    }

    fn compare(
        &mut self,
        event: &RecordedEvent,
        previous: Position,
        item: &MirrorItem,
        problems: &mut Problems,
    ) {
        let begun = self.first.is_some();
        self.first.get_or_insert(event.position);
        self.last = event.position;
        self.compared += 1;
        let MirrorItem::Event { sequence, previous: said, event: mirrored, .. } = item else { return };
        let mut different = Vec::new();
        let mut compare = |what: &'static str, same: bool| {
            if !same {
                different.push(what);
            }
        };
        compare("id", mirrored.id == event.id);
        compare("stream", mirrored.stream == event.stream);
        compare("version", mirrored.version == event.version);
        compare("name", mirrored.name == event.name);
        compare("codec", mirrored.codec == event.codec);
        compare("payload", mirrored.payload == event.payload);
        compare("metadata", mirrored.metadata == event.metadata);
        compare("command id", mirrored.command_id == event.command_id);
        compare("time", mirrored.recorded_at == event.recorded_at);
        // The first message states the position after which the mirror begins.
        compare("previous position", !begun || *said == previous);
        if !different.is_empty() {
            problems.add(format!(
                "mirror: message {sequence} differs from the event at position {}: {}",
                event.position,
                different.join(", ")
            ));
        }
    }

    /// Ends the comparison at `head`. Later messages of the mirror must be newer appends.
    pub(crate) async fn end(&mut self, head: Position, problems: &mut Problems) -> Result<(), Failure> {
        if self.behind > 0 && self.published(head).await? {
            // The mirror had all events, and its limits have removed them.
            self.before += self.behind;
            self.behind = 0;
        }
        if self.behind > 0 {
            problems.add(format!(
                "mirror: ends at position {}, {} events before the log's {head}",
                self.last, self.behind
            ));
        }
        while let Some(item) = self.peek(problems, false).await? {
            let (place, text) = (place(item), again(item));
            if place <= self.last && self.first.is_some() {
                problems.add(text);
                self.next = None;
                continue;
            }
            let end = self.store.high_water_mark().await?;
            if place > end {
                problems.add(format!("mirror: continues at position {place}, but the log ends at {end}"));
            }
            break;
        }
        Ok(())
    }

    /// Returns whether the stream is empty and had all events up to `head`.
    async fn published(&self, head: Position) -> Result<bool, Failure> {
        Ok(self.first.is_none() && !self.is_to_come(head).await?)
    }

    pub(crate) fn value(&self) -> Value {
        json!({ "compared": self.compared, "first": self.first.map(Position::get), "last": self.last.get(),
            "not_kept": self.before, "behind": self.behind })
    }

    pub(crate) fn line(&self) -> String {
        let kept = match (self.first, self.before) {
            (None, _) => "the mirror keeps none of them".to_owned(),
            (Some(_), 0) => "the mirror keeps all of them".to_owned(),
            (Some(first), before) => {
                format!("the mirror begins at position {first}, {before} events later than the log")
            }
        };
        format!("{} events were compared with the mirror; {kept}", self.compared)
    }
}

/// Returns the problem of a message with a repeated position.
fn again(item: &MirrorItem) -> String {
    let sequence = match item {
        MirrorItem::Event { sequence, .. } | MirrorItem::Omitted { sequence, .. } => *sequence,
        _ => 0,
    };
    format!("mirror: message {sequence} has position {} again", place(item))
}

fn place(item: &MirrorItem) -> Position {
    match item {
        MirrorItem::Event { event, .. } => event.position,
        MirrorItem::Omitted { position, .. } => *position,
        // Reported before.
        _ => Position::START,
    }
}
