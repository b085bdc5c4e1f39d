//! Pages of instances, found in the log.

use super::event::{COMPENSATING, ENDED, INPUT, PARKED, ProcessEvent};
use super::history::load_with_last;
use super::status::{InstanceState, InstanceStatus, status_of};
use crate::event::{EventName, Position, RecordedEvent, Version};
use crate::store::{EventStore, Filter, FilterError, ReadLog, StoreError};

/// Number of events in a page of the log.
const PAGE: usize = 200;

/// Maximum number of instances in a page.
const MAX_LIMIT: usize = 1_000;

/// A request for one page of the instances of a process. The default reads all, from the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReadInstances {
    /// Position in the log after which the page starts.
    pub after: Position,
    /// State of the instances; `None` for all.
    pub state: Option<InstanceState>,
    /// Maximum number of instances. Default: 100. Range: 1 to 1,000; other numbers become the nearest.
    pub limit: usize,
}

/// A page of instances, in the order of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InstancePage {
    /// Status of each instance at the time of the read.
    pub instances: Vec<InstanceStatus>,
    /// Position after which the next page starts; `None` at the end of the log.
    pub next: Option<Position>,
}

impl Default for ReadInstances {
    fn default() -> Self {
        Self { after: Position::START, state: None, limit: 100 }
    }
}

impl ReadInstances {
    /// Reads all instances from the beginning of the log, 100 at a time.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`after`](Self::after).
    #[must_use]
    pub fn after(mut self, position: Position) -> Self {
        self.after = position;
        self
    }

    /// Restricts to instances in this [`state`](Self::state).
    #[must_use]
    pub fn state(mut self, state: InstanceState) -> Self {
        self.state = Some(state);
        self
    }

    /// Sets [`limit`](Self::limit).
    #[must_use]
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }
}

/// The event at which an instance is found: the last one of its kind in its stream.
///
/// So one page finds an instance once, without a memory of the instances before.
#[derive(Debug, Clone, Copy)]
enum Marker {
    /// The first input.
    Start,
    Parked,
    Compensating,
    Ended,
}

impl Marker {
    /// Returns the marker of every instance in a state.
    fn of(state: Option<InstanceState>) -> Self {
        match state {
            None | Some(InstanceState::Running) => Self::Start,
            Some(InstanceState::Parked) => Self::Parked,
            Some(InstanceState::Compensating) => Self::Compensating,
            Some(InstanceState::Completed | InstanceState::Compensated | InstanceState::Cancelled) => {
                Self::Ended
            }
        }
    }

    fn filter(self, process: &str) -> Result<Filter, FilterError> {
        let variant = match self {
            Self::Start => INPUT,
            Self::Parked => PARKED,
            Self::Compensating => COMPENSATING,
            Self::Ended => ENDED,
        };
        let name = EventName::new(format!("{process}.{variant}"))?;
        Ok(Filter::all().category(process).with_names([name]))
    }

    fn is(self, event: &ProcessEvent) -> bool {
        match self {
            // The first event is known by its version.
            Self::Start => false,
            Self::Parked => matches!(event, ProcessEvent::Parked { .. }),
            Self::Compensating => matches!(event, ProcessEvent::Compensating {}),
            Self::Ended => matches!(event, ProcessEvent::Ended { .. }),
        }
    }
}

/// Reads a page of the instances of a process.
pub(super) async fn read_page(
    store: &dyn EventStore,
    process: &str,
    read: ReadInstances,
) -> Result<InstancePage, StoreError> {
    let limit = read.limit.clamp(1, MAX_LIMIT);
    let marker = Marker::of(read.state);
    let filter = marker.filter(process)?;
    let (mut instances, mut after) = (Vec::new(), read.after);
    loop {
        let page = store.read_log(ReadLog::after(after).filter(filter.clone()).limit(PAGE)).await?;
        for event in &page.events {
            let Some(status) = found_at(store, event, marker).await? else { continue };
            if read.state.is_some_and(|state| state != status.state) {
                continue;
            }
            instances.push(status);
            if instances.len() == limit {
                let next = (event.position < page.head).then_some(event.position);
                return Ok(InstancePage { instances, next });
            }
        }
        if !page.has_more() || page.scanned_to == after {
            return Ok(InstancePage { instances, next: None });
        }
        after = page.scanned_to;
    }
}

/// Returns the status of the instance that is found at an event.
async fn found_at(
    store: &dyn EventStore,
    event: &RecordedEvent,
    marker: Marker,
) -> Result<Option<InstanceStatus>, StoreError> {
    let is_start = matches!(marker, Marker::Start);
    if is_start && event.version != Version::NONE.next() {
        return Ok(None);
    }
    let (record, last) = load_with_last(store, &event.stream, |event| marker.is(event)).await?;
    Ok((is_start || last == event.version).then(|| status_of(&event.stream, record)))
}
