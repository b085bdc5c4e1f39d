//! Comparison of the log stream with the log.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use storied::bus::{LogStreamItem, LogStreamReader};
use storied::{EventStore, NatsBus, Position, RecordedEvent};
use tokio::time::{Instant, sleep};

use super::problems::Problems;
use crate::failure::Failure;

/// Poll interval of the log stream.
const POLL: Duration = Duration::from_millis(100);

pub(crate) struct LogStream {
    reader: LogStreamReader,
    store: Arc<dyn EventStore>,
    /// The next message, if it was read and is not compared yet.
    next: Option<LogStreamItem>,
    /// Time limit for the log stream to progress.
    deadline: Instant,
    /// Position of its first event.
    first: Option<Position>,
    last: Position,
    compared: u64,
    /// Number of events before its first one: removed by its limits, or never published to it.
    before: u64,
    /// Number of events of the log that are not in the log stream yet.
    behind: u64,
}

impl LogStream {
    pub(crate) async fn open(
        bus: &NatsBus,
        store: Arc<dyn EventStore>,
        within: Duration,
    ) -> Result<Self, Failure> {
        let reader = bus.read_log_stream(store.info().id).await?;
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
    async fn peek(&mut self, problems: &mut Problems, wait: bool) -> Result<Option<&LogStreamItem>, Failure> {
        while self.next.is_none() {
            match self.reader.next().await? {
                Some(LogStreamItem::Missing { sequence }) => {
                    problems.add(format!("log stream: message {sequence} was deleted"));
                }
                Some(LogStreamItem::Foreign { sequence, what }) => {
                    problems.add(format!("log stream: message {sequence} is not of this log: {what}"));
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
            let position = position_of(item);
            if position > event.position {
                if self.first.is_none() {
                    self.before += 1;
                } else {
                    problems.add(format!("log stream: the event at position {} is missing", event.position));
                }
                return Ok(());
            }
            let Some(item) = self.next.take() else { return Ok(()) };
            if position <= self.last && self.first.is_some() {
                problems.add(repeated_position(&item));
                continue;
            }
            if position < event.position {
                problems
                    .add(format!("log stream: has an event at position {position}, where the log has none"));
                continue;
            }
            self.compare(event, previous, &item, problems);
            return Ok(());
        }
    }

    /// Returns whether the log stream may still get an event; false if its limits have removed it.
    async fn is_to_come(&self, position: Position) -> Result<bool, Failure> {
        if self.first.is_some() || self.next.is_some() {
            return Ok(true);
        }
        let known = self.store.publisher_checkpoint().await?;
        Ok(known.sequence == 0 || known.sequence < self.reader.last_sequence() || known.position < position)
    }

    fn compare(
        &mut self,
        event: &RecordedEvent,
        previous: Position,
        item: &LogStreamItem,
        problems: &mut Problems,
    ) {
        let begun = self.first.is_some();
        self.first.get_or_insert(event.position);
        self.last = event.position;
        self.compared += 1;
        let LogStreamItem::Event { sequence, previous: stated, event: positions_in_stream, .. } = item else {
            return;
        };
        let mut different = Vec::new();
        let mut compare = |what: &'static str, same: bool| {
            if !same {
                different.push(what);
            }
        };
        compare("id", positions_in_stream.id == event.id);
        compare("stream", positions_in_stream.stream == event.stream);
        compare("version", positions_in_stream.version == event.version);
        compare("name", positions_in_stream.name == event.name);
        compare("codec", positions_in_stream.codec == event.codec);
        compare("payload", positions_in_stream.payload == event.payload);
        compare("metadata", positions_in_stream.metadata == event.metadata);
        compare("command id", positions_in_stream.command_id == event.command_id);
        compare("time", positions_in_stream.recorded_at == event.recorded_at);
        // The first message states the position after which the log stream begins.
        compare("previous position", !begun || *stated == previous);
        if !different.is_empty() {
            problems.add(format!(
                "log stream: message {sequence} differs from the event at position {}: {}",
                event.position,
                different.join(", ")
            ));
        }
    }

    /// Ends the comparison at `head`. Later messages of the log stream must be newer appends.
    pub(crate) async fn end(&mut self, head: Position, problems: &mut Problems) -> Result<(), Failure> {
        if self.behind > 0 && self.published(head).await? {
            // The log stream had all events, and its limits have removed them.
            self.before += self.behind;
            self.behind = 0;
        }
        if self.behind > 0 {
            problems.add(format!(
                "log stream: ends at position {}, {} events before the log's {head}",
                self.last, self.behind
            ));
        }
        while let Some(item) = self.peek(problems, false).await? {
            let (position, text) = (position_of(item), repeated_position(item));
            if position <= self.last && self.first.is_some() {
                problems.add(text);
                self.next = None;
                continue;
            }
            let end = self.store.high_water_mark().await?;
            if position > end {
                problems
                    .add(format!("log stream: continues at position {position}, but the log ends at {end}"));
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
            (None, _) => "the log stream keeps none of them".to_owned(),
            (Some(_), 0) => "the log stream keeps all of them".to_owned(),
            (Some(first), before) => {
                format!("the log stream begins at position {first}, {before} events later than the log")
            }
        };
        format!("{} events were compared with the log stream; {kept}", self.compared)
    }
}

/// Returns the problem of a message with a repeated position.
fn repeated_position(item: &LogStreamItem) -> String {
    let sequence = match item {
        LogStreamItem::Event { sequence, .. } | LogStreamItem::Omitted { sequence, .. } => *sequence,
        _ => 0,
    };
    format!("log stream: message {sequence} has position {} again", position_of(item))
}

fn position_of(item: &LogStreamItem) -> Position {
    match item {
        LogStreamItem::Event { event, .. } => event.position,
        LogStreamItem::Omitted { position, .. } => *position,
        // Reported before.
        _ => Position::START,
    }
}
