//! Start position of a projection: resolved once, stored beside its checkpoints, never undercut.

use super::task::ProjectionTask;
use crate::event::Position;
use crate::projection::interruption::Interruption;
use crate::projection::start_position::record_floor;
use crate::projection::{Projection, ReadModel, Start};
use crate::store::StoreError;

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    fn start(&self) -> Start {
        self.context.options.start.unwrap_or(Start::Beginning)
    }

    /// Returns the last position that is never applied.
    ///
    /// On a shared read model, the first owner resolves and records it.
    pub(super) async fn floor(&mut self) -> Result<Position, Interruption> {
        let (context, read_model) = (self.context, self.read_model);
        let start = self.start();
        if !read_model.shared() {
            let floor =
                context.floor.get_or_try_init(|| start.resolve(&*context.store, context.log_end)).await?;
            return Ok(*floor);
        }
        let known = read_model.projection(&context.name).await?;
        if let Some(floor) = known.start_position {
            return Ok(floor);
        }
        let floor = start.resolve(&*context.store, context.log_end).await?;
        Ok(record_floor(read_model, &context.name, known, floor).await?)
    }

    /// Returns the new start position for a reset; `None` if the recorded one stays.
    ///
    /// A start position of another store, or beyond the end of the log, for example after a
    /// restore, is invalid in this log.
    pub(super) async fn floor_after_reset(&mut self) -> Result<Option<Position>, Interruption> {
        let (context, read_model) = (self.context, self.read_model);
        if !read_model.shared() {
            return Ok(None);
        }
        match read_model.projection(&context.name).await {
            Ok(known) => {
                let position = known.start_position.unwrap_or_default();
                if position == Position::START || context.store.event_id_at(position).await?.is_some() {
                    return Ok(None);
                }
            }
            Err(StoreError::Incompatible { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let head = context.store.high_water_mark().await?;
        // A reset does not wait for a log that may never reach the position.
        let start = match self.start() {
            Start::At(position) if position > head => Start::Now,
            start => start,
        };
        start.resolve(&*context.store, head).await.map(Some)
    }
}
