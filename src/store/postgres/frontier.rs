//! How far the log may be read, asked once for all readers of the process.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::Row;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{ReadLog, Stall, StoreError};
use super::error::failed;
use super::notify::Hints;
use super::recent::Recent;
use super::{Core, from_sql, to_sql};
use crate::event::{Position, RecordedEvent};

const DOING: &str = "reading how far the log goes";

/// The tailer asks so often while the log grows …
const BUSY: Duration = Duration::from_millis(2);
/// … less and less while nothing happens, down to this, …
const IDLE: Duration = Duration::from_millis(100);
/// … and while nobody in this process listens, only to notice a stall.
const ALONE: Duration = Duration::from_secs(1);
/// After a failure.
const BROKEN: Duration = Duration::from_millis(500);

/// A frontier that stands still for so long while events wait behind it deserves a warning.
const STALLED: Duration = Duration::from_secs(5);

/// What is known of the end of the log.
#[derive(Debug)]
pub(super) struct Frontier {
    /// The last event that readers may have; never goes back.
    head: watch::Sender<Position>,
    /// Whether the tailer tells other processes of what this one appends.
    tells_others: bool,
    /// The last event that this process has appended.
    own: AtomicU64,
    /// Wakes the tailer.
    wake: Notify,
    /// How many questions were begun.
    asked: AtomicU64,
    /// The last event that this process knows to be in the log, with its id; never goes back.
    known: Mutex<Option<(Position, Uuid)>>,
    /// [`Connections::begun`](super::connection::Connections::begun) as of when the server was found to have that event.
    checked: AtomicU64,
    /// Whether commits are to wait for synchronous standbys.
    standbys: AtomicBool,
    /// The last question that was answered, and how. Locked while one is under way.
    answered: tokio::sync::Mutex<(u64, Result<(), StoreError>)>,
    /// Since when a transaction holds the frontier back, and where.
    held: Mutex<Option<(u64, Instant)>>,
    /// Appends of this process that are under way.
    appending: AtomicUsize,
    /// What this process has appended while nobody else did.
    recent: Mutex<Recent>,
}

/// An append that is under way.
pub(super) struct Appending<'a>(&'a Frontier);

impl Drop for Appending<'_> {
    fn drop(&mut self) {
        self.0.appending.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Frontier {
    pub(super) fn new(tells_others: bool) -> Self {
        Self {
            tells_others,
            head: watch::Sender::new(Position::START),
            own: AtomicU64::new(0),
            wake: Notify::new(),
            asked: AtomicU64::new(0),
            known: Mutex::default(),
            checked: AtomicU64::new(0),
            standbys: AtomicBool::new(false),
            answered: tokio::sync::Mutex::new((0, Ok(()))),
            held: Mutex::default(),
            appending: AtomicUsize::new(0),
            recent: Mutex::default(),
        }
    }

    /// An append begins.
    pub(super) fn appending(&self) -> Appending<'_> {
        self.appending.fetch_add(1, Ordering::AcqRel);
        Appending(self)
    }

    /// Whether it is worth looking if an append is alone: somebody waits for the event, and within this process nobody else
    /// appends.
    pub(super) fn may_tell(&self) -> bool {
        self.head.receiver_count() > 0 && self.appending.load(Ordering::Acquire) == 1
    }

    /// An append was committed on `server` that found everything below decided: `event` follows the one at `previous`.
    pub(super) fn settled(&self, server: u64, previous: Position, event: RecordedEvent) {
        // I1: another server that took over may lack events that were read here. It is asked for them first.
        if server != self.checked.load(Ordering::Acquire) {
            return;
        }
        let (position, id) = (event.position, event.id);
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).push(server, previous, event);
        self.reached(position, Some(id));
    }

    /// Whether commits waited for synchronous standbys when the server was last asked, at most about a second ago.
    pub(super) fn has_standbys(&self) -> bool {
        self.standbys.load(Ordering::Acquire)
    }

    /// What `read` asks for, if that was appended here to `server` just now; and how far that goes, at most to `end`.
    pub(super) fn recent(
        &self,
        server: u64,
        read: &ReadLog,
        end: Position,
    ) -> Option<(Vec<RecordedEvent>, Position)> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).read(server, read, end)
    }

    /// Readers may have everything up to `head`, the position of the event `id`. What was settled stays settled.
    fn reached(&self, head: Position, id: Option<Uuid>) {
        if let Some(id) = id {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.is_none_or(|(position, _)| position < head) {
                *known = Some((head, id));
            }
        }
        self.head.send_if_modified(|known| {
            let news = head > *known;
            *known = head.max(*known);
            news
        });
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Position> {
        let receiver = self.head.subscribe();
        // It may sleep for long while nobody listens.
        self.wake.notify_one();
        receiver
    }

    /// Says that this process has appended up to `position`.
    pub(super) fn announce(&self, position: Position) {
        self.own.fetch_max(position.get(), Ordering::AcqRel);
        // What is settled need not be asked for.
        if self.tells_others || position > *self.head.borrow() {
            self.wake.notify_one();
        }
    }

    /// Another process says that it has appended.
    fn heard(&self) {
        self.wake.notify_one();
    }

    /// The head as it was found last, if it is of use to somebody who has read up to `after`.
    pub(super) fn known(&self, after: Position) -> Option<Position> {
        let head = *self.head.borrow();
        (head > after && head.get() >= self.own.load(Ordering::Acquire)).then_some(head)
    }

    /// The head as it is now. All who ask while a question is under way share the next one, so that the database is asked
    /// one question at a time, however many readers there are.
    pub(super) async fn refresh(&self, core: &Arc<Core>) -> Result<Position, StoreError> {
        let before = self.asked.load(Ordering::Acquire);
        let mut answered = self.answered.lock().await;
        if answered.0 <= before {
            let number = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
            *answered = (number, self.ask(core).await);
        }
        answered.1.clone()?;
        Ok(*self.head.borrow())
    }

    async fn ask(&self, core: &Arc<Core>) -> Result<(), StoreError> {
        // From before the question: an append may be settled, and another server take over, while it is under way.
        let known = *self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let server = core.connections.begun();
        let mut session = core.connections.get(DOING).await?;
        let row = sqlx::query(core.sql.frontier.clone())
            .bind(to_sql(known.map_or(0, |(position, _)| position.get())))
            .persistent(core.connections.persistent())
            .fetch_one(&mut *session)
            .await
            .map_err(|error| failed(DOING, error))?;
        session.finish(DOING).await?;
        let columns = || -> Result<_, sqlx::Error> {
            let numbers = [from_sql(row.try_get(0)?), from_sql(row.try_get(1)?), from_sql(row.try_get(2)?)];
            Ok((numbers, row.try_get(3)?, row.try_get::<Option<Uuid>, _>(4)?, row.try_get(5)?))
        };
        let ([last_value, low_water, head], id, there, standbys) =
            columns().map_err(|error| failed(DOING, error))?;
        self.standbys.store(standbys, Ordering::Release);
        if let Some((position, id)) = known {
            let found = match there {
                Some(there) if there == id && last_value >= position.get() => None,
                Some(there) if there == id => {
                    Some(format!("the sequence of positions at {last_value}, as if it were set back"))
                }
                Some(other) => Some(format!("the event {other} there")),
                None => Some("none there".into()),
            };
            if let Some(found) = found {
                return Err(StoreError::Incompatible {
                    expected: format!("a log that goes at least to position {position}, with the event {id} there"),
                    found,
                    advice: "the database was restored, or a standby that had not received everything took over: rebuild what has read further, then restart".into(),
                });
            }
        }
        self.checked.store(server, Ordering::Release);
        // The mark may be lower than before for a moment: a writer that was slow to take its lock pulls it back.
        self.reached(Position::new(head), id);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        *held = match *held {
            _ if low_water >= last_value => None,
            Some((at, since)) if at == low_water => Some((at, since)),
            _ => Some((low_water, Instant::now())),
        };
        Ok(())
    }

    /// How long the frontier has stood still at the same place because of somebody.
    fn held_for(&self) -> Option<Duration> {
        let held = *self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.map(|(_, since)| since.elapsed())
    }
}

/// Who holds the frontier back at this moment, if anybody does.
pub(super) async fn stall(core: &Arc<Core>) -> Result<Option<Stall>, StoreError> {
    const DOING: &str = "looking for who holds the frontier back";
    let mut session = core.connections.get(DOING).await?;
    let row = sqlx::query(core.sql.stall.clone())
        .persistent(core.connections.persistent())
        .fetch_optional(&mut *session)
        .await
        .map_err(|error| failed(DOING, error))?;
    session.finish(DOING).await?;
    let Some(row) = row else { return Ok(None) };
    let columns = || -> Result<_, sqlx::Error> {
        Ok(Stall {
            pid: row.try_get(0)?,
            application_name: row.try_get(1)?,
            state: row.try_get(2)?,
            open_for: Duration::try_from_secs_f64(row.try_get(3)?).unwrap_or_default(),
            query: row.try_get(4)?,
            low_water: Position::new(from_sql(row.try_get(5)?)),
        })
    };
    columns().map(Some).map_err(|error| failed(DOING, error))
}

/// Keeps the head up to date for those who wait for it: on every append of this process, and by polling for those of
/// others. One for a store, whatever the number of its readers.
pub(super) async fn tail(core: Arc<Core>, hints: Option<Hints>) {
    match &hints {
        None => poll(&core, None).await,
        Some(hints) => {
            let heard = || core.frontier.heard();
            tokio::join!(poll(&core, Some(hints)), hints.listen(heard));
        }
    }
}

async fn poll(core: &Arc<Core>, hints: Option<&Hints>) {
    let frontier = &core.frontier;
    let mut hinted = None;
    let mut told = 0;
    let mut pause = BUSY;
    let mut broken = false;
    let mut warned: Option<Instant> = None;
    loop {
        let longest = if frontier.head.receiver_count() > 0 { pause } else { ALONE };
        let woken = tokio::time::timeout(longest, frontier.wake.notified()).await.is_ok();
        if let Some(hints) = hints {
            let own = frontier.own.load(Ordering::Acquire);
            if own > told
                && let Err(error) = core.timed_call(DOING, hints.send(core, &mut hinted)).await
            {
                tracing::debug!(%error, "other processes were not told of an append");
            }
            told = own;
        }
        if woken && frontier.head.receiver_count() == 0 {
            continue; // whoever comes to read will ask
        }
        let before = *frontier.head.borrow();
        match core.timed_call(DOING, frontier.refresh(core)).await {
            Ok(head) => {
                if broken {
                    tracing::info!(%head, "the event store can be read again");
                }
                broken = false;
                pause = if woken || head > before { BUSY } else { (pause * 2).min(IDLE) };
            }
            Err(error) => {
                if !broken {
                    tracing::warn!(%error, "the end of the log cannot be read");
                }
                broken = true;
                tokio::time::sleep(BROKEN).await;
                continue;
            }
        }
        match frontier.held_for() {
            Some(time) if time >= STALLED && warned.is_none_or(|last| last.elapsed() > STALLED * 6) => {
                warned = Some(Instant::now());
                match core.timed_call(DOING, stall(core)).await {
                    Ok(Some(stall)) => tracing::warn!(
                        pid = stall.pid,
                        application_name = stall.application_name,
                        state = stall.state,
                        open_for = ?stall.open_for,
                        query = stall.query,
                        low_water = %stall.low_water,
                        "a transaction holds back all followers of the log"
                    ),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, "the log stands still, and who causes it cannot be found out")
                    }
                }
            }
            Some(_) => {}
            None => warned = None,
        }
        if woken {
            // Appends that arrive meanwhile share the next question.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
