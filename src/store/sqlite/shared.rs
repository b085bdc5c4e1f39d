//! The state that all handles of a store share: its connections, and how they append events.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

use super::super::append::append_valid;
use super::super::page_size::PageSizer;
use super::super::{Append, AppendError, Appended, StoreError, StoreInfo};
use super::append::{self, Failure};
use super::connection::{Readers, Writer};
use super::number_cache::NumberCache;
use super::{error, read};
use crate::event::Position;

pub(super) struct Shared {
    pub(super) info: StoreInfo,
    pub(super) path: PathBuf,
    pub(super) writer: Writer,
    pub(super) readers: Readers,
    pub(super) page_sizer: PageSizer,
    pub(super) numbers: NumberCache,
    pub(super) appended: watch::Sender<Position>,
}

impl Shared {
    pub(super) async fn append_batch(&self, batch: Vec<Append>) -> Vec<Result<Appended, AppendError>> {
        append_valid(batch, append::LIMITS, |batch| async move {
            let appends = batch.len();
            match self.write(batch).await {
                Ok(written) => {
                    let last =
                        written.iter().flatten().filter_map(|appended| appended.positions.last()).max();
                    if let Some(last) = last {
                        self.announce(*last);
                    }
                    written
                }
                Err(error) => vec![Err(error.into()); appends],
            }
        })
        .await
    }

    async fn write(&self, batch: Vec<Append>) -> Result<Vec<Result<Appended, AppendError>>, StoreError> {
        let result = self
            .writer
            .run(append::DOING, |connection| append::append(connection, &batch, &self.numbers))
            .await?;
        let (error, written) = match result {
            Ok(written) => return Ok(written.answers),
            Err(Failure::Commit(error, written)) => (error, written),
            // A key that is violated although all was looked up belongs to the application.
            Err(Failure::Refused(error) | Failure::Outdated { error, .. }) => return Err(error),
        };
        // I4: a failed commit has usually not happened, and the look-up is cheap.
        let Some((position, id)) = written.proof else { return Ok(written.answers) };
        match read::is_at(&self.readers, position, id).await {
            Ok(true) => {
                tracing::warn!(%error, %position, "commit reported an error, but the events are in the log");
                Ok(written.answers)
            }
            // The events are absent now, but a crash may restore them.
            Ok(false) if error::is_sync_failure(&error) => {
                Err(StoreError::OutcomeUnknown { reason: error.to_string(), source: Some(Arc::new(error)) })
            }
            Ok(false) => Err(error),
            Err(lookup) => Err(StoreError::OutcomeUnknown {
                reason: format!("{error}; looking up the events failed: {lookup}"),
                source: Some(Arc::new(error)),
            }),
        }
    }

    /// Notifies the readers of this process of the end of the log.
    pub(super) fn announce(&self, head: Position) {
        self.appended.send_if_modified(|known| {
            let news = head > *known;
            *known = head.max(*known);
            news
        });
    }
}
