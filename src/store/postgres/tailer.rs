//! Keeps the high-water mark current, and finds the transaction that holds it back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::Row;
use tokio::time::Instant;

use super::super::{HighWaterStall, StoreError};
use super::convert::from_sql;
use super::error::failed;
use super::high_water_mark::DOING;
use super::inner::PgInner;
use super::notify::Hints;
use crate::event::Position;

/// Poll interval while the log grows.
const BUSY: Duration = Duration::from_millis(2);
/// Maximum poll interval while the log does not grow.
const IDLE: Duration = Duration::from_millis(100);
/// Poll interval without readers in this process, sufficient to detect a stall.
const ALONE: Duration = Duration::from_secs(1);
/// Pause after a failure.
const BROKEN: Duration = Duration::from_millis(500);

/// Time without progress, while events wait above the mark, after which a warning is logged.
const STALLED: Duration = Duration::from_secs(5);

/// Keeps the mark current for its subscribers; one tailer per store, for any number of readers.
///
/// It queries after every append of this process, and polls for the appends of other processes.
pub(super) async fn run_tailer(core: Arc<PgInner>, hints: Option<Hints>) {
    match &hints {
        None => poll_loop(&core, None).await,
        Some(hints) => {
            let wake = || core.high_water_mark.wake();
            tokio::join!(poll_loop(&core, Some(hints)), hints.listen(wake));
        }
    }
}

async fn poll_loop(core: &Arc<PgInner>, hints: Option<&Hints>) {
    let high_water_mark = &core.high_water_mark;
    let mut hinted = None;
    let mut announced = 0;
    let mut pause = BUSY;
    let mut broken = false;
    let mut warned: Option<Instant> = None;
    loop {
        let longest = if high_water_mark.head.receiver_count() > 0 { pause } else { ALONE };
        let woken = tokio::time::timeout(longest, high_water_mark.wake.notified()).await.is_ok();
        if let Some(hints) = hints {
            let last_local_append = high_water_mark.last_local_append.load(Ordering::Acquire);
            if last_local_append > announced
                && let Err(error) = core.timed_call(DOING, hints.send(&core.connections, &mut hinted)).await
            {
                tracing::debug!(%error, "could not notify other processes of an append");
            }
            announced = last_local_append;
        }
        if woken && high_water_mark.head.receiver_count() == 0 {
            continue; // A later reader starts a query itself.
        }
        let before = *high_water_mark.head.borrow();
        match core.timed_call(DOING, high_water_mark.refresh(&core.connections, &core.sql)).await {
            Ok(head) => {
                if broken {
                    tracing::info!(%head, "the event store is readable again");
                }
                broken = false;
                pause = if woken || head > before { BUSY } else { (pause * 2).min(IDLE) };
            }
            Err(error) => {
                if !broken {
                    tracing::warn!(%error, "could not read the high-water mark; retrying");
                }
                broken = true;
                tokio::time::sleep(BROKEN).await;
                continue;
            }
        }
        match high_water_mark.stalled_for() {
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
                        "a transaction holds back all readers of the log"
                    ),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, "the log is stalled, and looking up the cause failed")
                    }
                }
            }
            Some(_) => {}
            None => warned = None,
        }
        if woken {
            // Appends that arrive meanwhile share the next query.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Returns the transaction that holds back the mark at this moment, if any.
pub(super) async fn stall(core: &Arc<PgInner>) -> Result<Option<HighWaterStall>, StoreError> {
    const DOING: &str = "looking up the transaction that holds back the log";
    let mut session = core.connections.get(DOING).await?;
    let row = sqlx::query(core.sql.stall.clone())
        .persistent(core.connections.persistent())
        .fetch_optional(&mut *session)
        .await
        .map_err(|error| failed(DOING, error))?;
    session.finish(DOING).await?;
    let Some(row) = row else { return Ok(None) };
    let columns = || -> Result<_, sqlx::Error> {
        Ok(HighWaterStall {
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
