//! Announces the appends of other processes to the readers of this process.

use std::sync::Weak;
use std::time::Duration;

use super::read;
use super::shared::Shared;
use crate::event::Position;

/// Poll interval after the log has grown.
const BUSY: Duration = Duration::from_millis(5);
/// Maximum poll interval. The interval doubles up to it while the log does not grow.
const IDLE: Duration = Duration::from_millis(250);

/// Polls the end of the log while there are readers, until the last handle to the store is dropped.
pub(super) async fn run_tailer(store: Weak<Shared>) {
    let (mut known, mut pause) = (Position::START, BUSY);
    loop {
        tokio::time::sleep(pause).await;
        let Some(store) = store.upgrade() else { return };
        if store.appended.receiver_count() == 0 {
            pause = IDLE;
            continue;
        }
        match read::high_water_mark(&store.readers).await {
            Ok(head) => store.announce(head),
            Err(error) => tracing::debug!(%error, "could not poll the end of the log"),
        }
        let head = *store.appended.borrow();
        pause = if head > known { BUSY } else { (pause * 2).min(IDLE) };
        known = head;
    }
}
