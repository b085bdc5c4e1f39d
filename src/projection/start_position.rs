//! Start position of a projection that has applied nothing yet.

use chrono::{DateTime, Utc};

use std::sync::Arc;

use super::ReadModel;
use super::interruption::Interruption;
use super::layout::{ATTEMPTS, contended};
use crate::event::Position;
use crate::store::{
    Checkpoint, CheckpointError, EventStore, Filter, ProgressWrite, ReadLog, StoreError, StoredProjection,
};

/// Maximum time by which a later event in log order may carry an earlier recorded time.
const SKEW: chrono::Duration = chrono::Duration::hours(1);

/// Number of events in a page of the scan.
const PAGE: usize = 500;

/// Start position in the log of a projection without a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// The first event of the log.
    Beginning,
    /// After the last event that is in the log when the runtime first starts the projection.
    ///
    /// Every append after [`start()`](crate::runtime::Builder::start) returned is applied. An
    /// append in flight at that moment may move the start a few events back.
    Now,
    /// The event with this position, inclusive.
    ///
    /// While the log ends before the preceding position, the projection waits and reports that in
    /// its status.
    At(Position),
    /// The first event in log order that was recorded at this time or later.
    ///
    /// The log is not sorted by time: if writers overlap, a later event may carry an earlier time.
    /// So events from before this time can follow, and are applied. No event of this time or later
    /// is skipped, if the times of the log go back by less than an hour. If there is no such event,
    /// this is [`Now`](Self::Now).
    Since(DateTime<Utc>),
}

impl Start {
    /// Returns the last position that is not applied; `now` is that of [`Now`](Self::Now).
    pub(super) async fn resolve(
        self,
        store: &dyn EventStore,
        now: Position,
    ) -> Result<Position, Interruption> {
        match self {
            Self::Beginning => Ok(Position::START),
            Self::Now => Ok(now),
            Self::At(position) => {
                let before = before(position);
                let head = store.high_water_mark().await?;
                if before > head {
                    let reason = format!(
                        "waiting for start position {position}: the log ends at {head} (ProjectionOptions::start)"
                    );
                    return Err(Interruption::Later { reason });
                }
                Ok(last_event(store, before).await?)
            }
            Self::Since(time) => Ok(before_time(store, time, now).await?),
        }
    }
}

/// Records the start position of a projection outside the event store, if none is recorded yet.
///
/// Records `start` if it is known by now, or the start of an empty log. Returns whether it is known
/// now.
pub(crate) async fn record_start(
    read_model: &impl ReadModel,
    store: &Arc<dyn EventStore>,
    projection: &str,
    start: Option<Start>,
    head: Position,
) -> Result<bool, StoreError> {
    let floor = match start {
        Some(Start::Now) => Some(head),
        // The worker finds the position.
        Some(_) => return Ok(true),
        None => (head == Position::START).then_some(head),
    };
    read_model.prepare(store).await?;
    let known = read_model.projection(projection).await?;
    match floor {
        Some(floor) => record_floor(read_model, projection, known, floor).await.map(|_| true),
        None => Ok(known.start_position.is_some()),
    }
}

/// Records a start position; if another task or node was faster, its position counts.
pub(super) async fn record_floor(
    read_model: &impl ReadModel,
    projection: &str,
    mut known: StoredProjection,
    floor: Position,
) -> Result<Position, StoreError> {
    for _ in 0..ATTEMPTS {
        if let Some(recorded) = known.start_position {
            return Ok(recorded);
        }
        let open = read_model.begin(projection, Checkpoint::default(), None).await?;
        let to = StoredProjection { start_position: Some(floor), ..known };
        let write = ProgressWrite::Projection { name: projection.to_owned(), from: known, to };
        match read_model.commit(open, vec![write]).await {
            Ok(()) => return Ok(floor),
            Err(CheckpointError::Store(error)) => return Err(error),
            Err(_) => known = read_model.projection(projection).await?,
        }
    }
    Err(contended(projection))
}

fn before(position: Position) -> Position {
    Position::new(position.get().saturating_sub(1))
}

/// Returns the position of the last event up to `position`.
///
/// A checkpoint is always at an event, or at the start of the log.
async fn last_event(store: &dyn EventStore, position: Position) -> Result<Position, StoreError> {
    let mut width = 1_000;
    loop {
        let after = Position::new(position.get().saturating_sub(width));
        let nothing = Filter::all().with_names([]);
        let page = store.read_log(ReadLog::after(after).upto(position).filter(nothing).limit(1)).await?;
        if page.scanned_to > after || after == Position::START {
            return Ok(page.scanned_to);
        }
        width = width.saturating_mul(2);
    }
}

/// Returns the last position before the first event that was recorded at `time` or later; `now` if
/// there is none.
///
/// Reads some tens of single events, and the events of the [`SKEW`] before `time`.
async fn before_time(
    store: &dyn EventStore,
    time: DateTime<Utc>,
    now: Position,
) -> Result<Position, StoreError> {
    let certain = time.checked_sub_signed(SKEW).unwrap_or(DateTime::<Utc>::MIN_UTC);
    let head = store.high_water_mark().await?;
    let (mut low, mut high) = (Position::START, head);
    while low < high {
        let middle = Position::new(low.get() + (high.get() - low.get()) / 2);
        let page = store.read_log(ReadLog::after(middle).upto(high).limit(1)).await?;
        match page.events.first() {
            Some(event) if event.recorded_at < certain => low = event.position,
            _ => high = middle,
        }
    }
    loop {
        let page = store.read_log(ReadLog::after(low).upto(head).limit(PAGE)).await?;
        if let Some(first) = page.events.iter().find(|event| event.recorded_at >= time) {
            return last_event(store, before(first.position)).await;
        }
        if page.scanned_to <= low || page.scanned_to >= head {
            return Ok(now);
        }
        low = page.scanned_to;
    }
}
