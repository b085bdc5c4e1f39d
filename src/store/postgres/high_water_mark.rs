//! The high-water mark, queried once for all readers of the process.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::Row;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{ReadLog, StoreError};
use super::connection::Connections;
use super::convert::{from_sql, to_sql};
use super::error::failed;
use super::statements::LogSql;
use super::tail_cache::TailCache;
use crate::event::{Position, RecordedEvent};

pub(super) const DOING: &str = "reading the high-water mark";

/// The known end of the log.
#[derive(Debug)]
pub(super) struct HighWaterMark {
    /// Last event that readers may see; never decreases.
    pub(super) head: watch::Sender<Position>,
    /// Whether the tailer notifies other processes of the appends of this process.
    notifies_others: bool,
    /// Last event that this process has appended.
    pub(super) last_local_append: AtomicU64,
    /// Wakes the tailer.
    pub(super) wake: Notify,
    /// Number of queries started.
    query_count: AtomicU64,
    /// Last event known to be in the log, with its id; never decreases.
    known: Mutex<Option<(Position, Uuid)>>,
    /// [`Connections::begun`] when the server last confirmed it.
    checked: AtomicU64,
    /// Server process that last confirmed it, as `storied.server()` returns it.
    confirmed_by: AtomicI64,
    /// Whether commits wait for synchronous standbys.
    standbys: AtomicBool,
    /// Number and result of the last answered query. Locked while a query is in flight.
    answered: tokio::sync::Mutex<(u64, Result<(), StoreError>)>,
    /// Position at which a transaction holds back the mark, and the time since it does.
    stalled_since: Mutex<Option<(u64, Instant)>>,
    /// Number of appends of this process in flight.
    appending: AtomicUsize,
    /// Events appended by this process while no other process appended.
    tail_cache: Mutex<TailCache>,
}

/// Counts an append in flight until it is dropped.
pub(super) struct Appending<'a>(&'a HighWaterMark);

impl Drop for Appending<'_> {
    fn drop(&mut self) {
        self.0.appending.fetch_sub(1, Ordering::AcqRel);
    }
}

impl HighWaterMark {
    pub(super) fn new(notifies_others: bool) -> Self {
        Self {
            notifies_others,
            head: watch::Sender::new(Position::START),
            last_local_append: AtomicU64::new(0),
            wake: Notify::new(),
            query_count: AtomicU64::new(0),
            known: Mutex::default(),
            checked: AtomicU64::new(0),
            confirmed_by: AtomicI64::new(0),
            standbys: AtomicBool::new(false),
            answered: tokio::sync::Mutex::new((0, Ok(()))),
            stalled_since: Mutex::default(),
            appending: AtomicUsize::new(0),
            tail_cache: Mutex::default(),
        }
    }

    /// Counts the start of an append.
    pub(super) fn appending(&self) -> Appending<'_> {
        self.appending.fetch_add(1, Ordering::AcqRel);
        Appending(self)
    }

    /// Returns whether a lone append should check that no other append is in flight.
    ///
    /// It should if a reader waits for the event and no other append of this process is in flight.
    pub(super) fn can_skip_query(&self) -> bool {
        self.head.receiver_count() > 0 && self.appending.load(Ordering::Acquire) == 1
    }

    /// Records an append committed on `server` after all lower positions were decided.
    ///
    /// `event` follows the event at `previous`.
    pub(super) fn advance_locally(&self, server: u64, previous: Position, event: RecordedEvent) {
        // I1: another server that took over may lack events that were read here. A query checks it
        // first.
        if server != self.checked.load(Ordering::Acquire) {
            return;
        }
        let (position, id) = (event.position, event.id);
        self.tail_cache.lock().unwrap_or_else(PoisonError::into_inner).push(server, previous, event);
        self.advance(position, Some(id));
    }

    /// Returns whether commits waited for synchronous standbys at the last query.
    ///
    /// The last query was at most about 1 s ago.
    pub(super) fn has_standbys(&self) -> bool {
        self.standbys.load(Ordering::Acquire)
    }

    /// Returns the events for `read`, if this process has just appended them to `server`.
    ///
    /// Also returns the position that they reach, at most `end`.
    pub(super) fn recent(
        &self,
        server: u64,
        read: &ReadLog,
        end: Position,
    ) -> Option<(Vec<RecordedEvent>, Position)> {
        self.tail_cache.lock().unwrap_or_else(PoisonError::into_inner).read(server, read, end)
    }

    /// Returns the id of the event at the mark, if the mark is at `position`.
    pub(super) fn id_at(&self, position: Position) -> Option<Uuid> {
        let known = *self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.filter(|(known, _)| *known == position).map(|(_, id)| id)
    }

    /// Records an event that is in the log, perhaps above the mark.
    pub(super) fn record(&self, position: Position, id: Uuid) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none_or(|(last, _)| last < position) {
            *known = Some((position, id));
        }
    }

    /// Returns whether `server` is the server process that last confirmed the recorded events.
    pub(super) fn is_confirmed_by(&self, server: i64) -> bool {
        self.confirmed_by.load(Ordering::Acquire) == server
    }

    /// Advances the mark to `head`, the position of the event `id`; never moves it backwards.
    pub(super) fn advance(&self, head: Position, id: Option<Uuid>) {
        if let Some(id) = id {
            self.record(head, id);
        }
        self.head.send_if_modified(|known| {
            let news = head > *known;
            *known = head.max(*known);
            news
        });
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Position> {
        let receiver = self.head.subscribe();
        // Without readers the tailer may sleep for long.
        self.wake.notify_one();
        receiver
    }

    /// Announces that this process has appended up to `position`.
    pub(super) fn announce(&self, position: Position) {
        self.last_local_append.fetch_max(position.get(), Ordering::AcqRel);
        // No query is needed without readers, or if the mark is at the position. A later reader wakes
        // the tailer itself.
        let awaited = self.head.receiver_count() > 0 && position > *self.head.borrow();
        if self.notifies_others || awaited {
            self.wake.notify_one();
        }
    }

    /// Wakes the tailer after a hint of another process.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Returns the cached mark, if it is useful to a reader that has read up to `after`.
    pub(super) fn cached(&self, after: Position) -> Option<Position> {
        let head = *self.head.borrow();
        (head > after && head.get() >= self.last_local_append.load(Ordering::Acquire)).then_some(head)
    }

    /// Queries the current mark.
    ///
    /// All callers that arrive during a query share the next one. So the database answers one query
    /// at a time, however many readers there are.
    pub(super) async fn refresh(
        &self,
        connections: &Arc<Connections>,
        sql: &LogSql,
    ) -> Result<Position, StoreError> {
        let before = self.query_count.load(Ordering::Acquire);
        let mut answered = self.answered.lock().await;
        if answered.0 <= before {
            let number = self.query_count.fetch_add(1, Ordering::AcqRel) + 1;
            *answered = (number, self.query(connections, sql).await);
        }
        answered.1.clone()?;
        Ok(*self.head.borrow())
    }

    async fn query(&self, connections: &Arc<Connections>, sql: &LogSql) -> Result<(), StoreError> {
        // Read before the query: meanwhile an append may settle and another server may take over.
        let known = *self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let server = connections.begun();
        let mut session = connections.get(DOING).await?;
        let row = sqlx::query(sql.high_water_mark.clone())
            .bind(to_sql(known.map_or(0, |(position, _)| position.get())))
            .persistent(connections.persistent())
            .fetch_one(&mut *session)
            .await
            .map_err(|error| failed(DOING, error))?;
        session.finish(DOING).await?;
        let columns = || -> Result<_, sqlx::Error> {
            let numbers = [from_sql(row.try_get(0)?), from_sql(row.try_get(1)?), from_sql(row.try_get(2)?)];
            let there = row.try_get::<Option<Uuid>, _>(4)?;
            Ok((numbers, row.try_get(3)?, there, row.try_get(5)?, row.try_get(6)?))
        };
        let ([last_value, low_water, head], id, there, standbys, process) =
            columns().map_err(|error| failed(DOING, error))?;
        self.standbys.store(standbys, Ordering::Release);
        if let Some((position, id)) = known {
            let found = match there {
                Some(there) if there == id && last_value >= position.get() => None,
                Some(there) if there == id => {
                    Some(format!("the sequence of positions at {last_value}, which is lower"))
                }
                Some(other) => Some(format!("event {other} there")),
                None => Some("no event there".into()),
            };
            if let Some(found) = found {
                return Err(StoreError::Incompatible {
                    expected: format!("a log up to position {position} or higher, with event {id} there"),
                    found,
                    advice: "the database was restored, or a standby without the last events took over: rebuild the readers that are ahead of the log, then restart".into(),
                });
            }
        }
        self.checked.store(server, Ordering::Release);
        self.confirmed_by.store(process, Ordering::Release);
        // The mark may be lower than before for a moment: a writer that takes its lock late lowers
        // it.
        self.advance(Position::new(head), id);
        let mut stalled_since = self.stalled_since.lock().unwrap_or_else(PoisonError::into_inner);
        *stalled_since = match *stalled_since {
            _ if low_water >= last_value => None,
            Some((at, since)) if at == low_water => Some((at, since)),
            _ => Some((low_water, Instant::now())),
        };
        Ok(())
    }

    /// Returns how long a transaction has stalled_since the mark at the same position.
    pub(super) fn stalled_for(&self) -> Option<Duration> {
        let stalled_since = *self.stalled_since.lock().unwrap_or_else(PoisonError::into_inner);
        stalled_since.map(|(_, since)| since.elapsed())
    }
}
