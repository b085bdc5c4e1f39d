//! Versions of a read model: the live one, and the one that is built until the cut-over.
//!
//! Each version has tables and checkpoints of its own. The tasks that build a version run beside
//! the tasks of the live one, with leases of their own, so both survive the death of any node. The
//! cut-over is one transaction, in which the tasks exchange nothing: each task looks up its version
//! and continues from its checkpoint.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::change::{Change, GRACE, ORDER, blame, interrupted, refused};
use super::context::TaskConfig;
use super::task::ProjectionTask;
use super::user_code::catch_panic;
use crate::event::Position;
use crate::projection::layout::{Versions, bump};
use crate::projection::{ControlError, Projection, ProjectionState, ReadModel};
use crate::store::{Checkpoint, CheckpointError, StoreError};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Switches to the current version for this task's role.
    pub(super) async fn find_version(&mut self) -> Result<(), StoreError> {
        let context = self.context;
        let version = context.version(self.read_model).await?;
        self.dormant = version.is_none();
        context.status.send_if_modified(|status| {
            if version.is_none() {
                status.measured = None;
            }
            std::mem::replace(&mut status.dormant, version.is_none()) != version.is_none()
        });
        match version {
            Some(version) => self.use_version(version),
            None => Ok(()),
        }
    }

    pub(super) fn use_version(&mut self, version: u64) -> Result<(), StoreError> {
        let Self { context, instance, .. } = self;
        if instance.version != version {
            let Some(make) = &instance.make else {
                return Err(StoreError::Incompatible {
                    expected: format!("the read model of projection {} in version 0", context.name),
                    found: format!("version {version}, made by a rebuild"),
                    advice: "register the projection as rebuildable, so that it writes to the live version"
                        .into(),
                });
            };
            instance.projection = make(version);
            instance.version = version;
            // The progress of another version does not apply to this one.
            self.rebuild_progress.clear();
            self.switch_backoff.succeeded();
            context.status.send_modify(|status| status.measured = None);
        }
        self.row = context.layout.row(context.partition, version);
        context.status.send_modify(|status| status.version = version);
        Ok(())
    }

    /// Waits on standby, because there is nothing to build.
    pub(super) async fn sleep(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.release().await;
        }
        self.context.set(ProjectionState::Standby);
        self.idle(self.tick_at).await;
    }

    /// Starts the speed measurement of this node.
    pub(super) fn measures_from(&mut self, position: Position) {
        self.context.status.send_modify(|status| {
            status.measured.get_or_insert((Instant::now(), position));
        });
    }

    /// Begins to build the next version, unless a rebuild is in progress.
    ///
    /// With `requested`, only if that request still exists.
    pub(super) async fn rebuild(&mut self, requested: Option<&str>) -> Result<(), ControlError> {
        self.create().await.map_err(interrupted(self.context))?;
        self.rebuildable()?;
        match self.patiently(Change::BeginRebuild { requested }).await? {
            true => self.notify_tasks().await,
            false => Ok(()),
        }
    }

    /// Returns the factory of instances by version.
    fn rebuildable(&self) -> Result<&(dyn Fn(u64) -> P + Send + Sync), ControlError> {
        let not = |reason| ControlError::NotRebuildable { name: self.context.name.clone(), reason };
        if !self.read_model.rolls_back() || !self.read_model.shared() {
            return Err(not("its read model cannot be cut over in a transaction; reset it instead"));
        }
        self.instance.make.as_deref().ok_or_else(|| {
            not("it was registered with a single version; register it with Builder::rebuildable")
        })
    }

    /// Begins a rebuild; returns whether the request still existed.
    pub(super) async fn begin_rebuild(&mut self, requested: Option<&str>) -> Result<bool, ControlError> {
        let (context, read_model) = (self.context, self.read_model);
        let record = context.layout.version();
        let found = read_model.checkpoint(&record).await?;
        let versions = Versions::from(found);
        if versions.rebuilt.is_some() {
            return self.nothing_to_do(requested, &record, found).await;
        }
        let next = versions.next();
        let wanted = Versions { rebuilt: Some(next), ..versions }.record(found);
        let mut projection = self.rebuildable()?(next);
        let mut open = self.read_model.begin(&record, found).await?;
        let result = async {
            read_model.bound(&mut open, ORDER + GRACE).await?;
            // First, and held until the end: an earlier build may be discarded concurrently.
            read_model.save(&mut open, &record, found, wanted).await.map_err(refused(self.context))?;
            let transaction = read_model.transaction(&mut open);
            let created = catch_panic(async { projection.reset(transaction).await }).await;
            created.map_err(|error| blame(context, read_model, &error))?;
            // Last: during a vain wait above, the request is not locked and can still be refused.
            match requested {
                Some(request) => Ok(read_model.unpark(&mut open, request, Position::START).await?),
                None => Ok(true),
            }
        };
        match timeout(ORDER, result).await {
            Ok(Ok(true)) => {}
            Ok(other) => {
                self.roll_back(open).await;
                return other;
            }
            Err(_) => return Err(self.locked(ORDER, "could not be created; request the rebuild again")),
        }
        self.read_model.commit(open, &record, wanted, wanted, None).await.map_err(refused(self.context))?;
        tracing::info!(
            projection = context.name,
            version = next,
            "began to rebuild the read model beside the live one"
        );
        Ok(true)
    }

    /// Deletes a request that is already fulfilled; returns whether it still existed.
    async fn nothing_to_do(
        &mut self,
        requested: Option<&str>,
        record: &str,
        found: Checkpoint,
    ) -> Result<bool, ControlError> {
        let Some(request) = requested else { return Ok(true) };
        let mut open = self.read_model.begin(record, found).await?;
        match self.read_model.unpark(&mut open, request, Position::START).await {
            Ok(true) => {
                self.read_model
                    .commit(open, record, found, found, None)
                    .await
                    .map_err(refused(self.context))?;
                Ok(true)
            }
            other => {
                self.roll_back(open).await;
                Ok(other?)
            }
        }
    }

    /// Cancels the rebuild, if there is one. With `requested`, only if that request still exists.
    pub(super) async fn cancel_rebuild(&mut self, requested: Option<&str>) -> Result<(), ControlError> {
        self.create().await.map_err(interrupted(self.context))?;
        self.rebuildable()?;
        let asked = match requested {
            // A repeated request moves this checkpoint.
            Some(row) => Some((row, self.read_model.checkpoint(row).await?)),
            None => None,
        };
        if !self.patiently(Change::EndRebuild { requested }).await? {
            return Ok(());
        }
        let dropped = async {
            self.notify_tasks().await?;
            // Tasks in the middle of a transaction can no longer commit, and have released the
            // tables or are about to.
            self.patiently(Change::Discard { asked }).await
        };
        dropped.await.map(drop).map_err(|error| {
            let reason = match error {
                ControlError::Refused { reason, .. } | ControlError::Unavailable { reason, .. } => reason,
                error => error.to_string(),
            };
            let reason = format!(
                "the rebuild is cancelled, but dropping its data failed: {reason}; cancel it again to drop the data"
            );
            ControlError::Refused { name: self.context.name.clone(), reason }
        })
    }

    /// Ends the rebuild and moves its checkpoints to the start of the next one.
    ///
    /// Returns whether the request still existed. The request stays until the data is dropped, too.
    pub(super) async fn end_rebuild(&mut self, requested: Option<&str>) -> Result<bool, ControlError> {
        let (TaskConfig { layout, name, .. }, read_model) = (self.context, self.read_model);
        let record = layout.version();
        let found = self.read_model.checkpoint(&record).await?;
        let versions = Versions::from(found);
        if let Some(request) = requested
            && ReadModel::parked(read_model, request, 1).await?.iter().all(|kept| kept.attempts > 0)
        {
            return Ok(false);
        }
        let Some(version) = versions.rebuilt else { return Ok(true) };
        let ended = Versions { rebuilt: None, ..versions }.record(found);
        // The rebuild has as many parts as it began with, independent of this program's setting.
        // That number is constant during a rebuild. It is read outside the transaction: inside, it
        // would need a second connection.
        let parts: Vec<_> = layout.as_recorded(read_model).await?.parts().collect();
        let mut open = self.read_model.begin(&record, found).await?;
        let result = async {
            read_model.save(&mut open, &record, found, ended).await.map_err(refused(self.context))?;
            for part in parts {
                let row = layout.row(part, version);
                let found = read_model.adopt(&mut open, &row).await?;
                let restarted = Checkpoint { position: Position::START, ..bump(found) };
                self.read_model
                    .save(&mut open, &row, found, restarted)
                    .await
                    .map_err(refused(self.context))?;
                self.read_model.unpark_all(&mut open, &row).await?;
            }
            Ok(true)
        };
        match result.await {
            Ok(true) => {}
            other => {
                self.roll_back(open).await;
                return other;
            }
        }
        self.read_model.commit(open, &record, ended, ended, None).await.map_err(refused(self.context))?;
        tracing::info!(projection = name, version, "cancelled the rebuild");
        Ok(true)
    }

    /// Drops the data of the next version, unless a new rebuild writes to it.
    pub(super) async fn drop_version(
        &mut self,
        asked: Option<(&str, Checkpoint)>,
    ) -> Result<(), ControlError> {
        let (context, read_model) = (self.context, self.read_model);
        let record = context.layout.version();
        let found = read_model.checkpoint(&record).await?;
        let versions = Versions::from(found);
        let rebuilding = versions.rebuilt.is_some();
        if rebuilding && asked.is_none() {
            return Ok(());
        }
        let mut projection = self.rebuildable()?(versions.next());
        // I7: no reader uses this position, but writers that know the old value are fenced and wait
        // for this commit.
        let to = Checkpoint { position: Position::new(found.position.get() + 1), ..found };
        let mut open = self.read_model.begin(&record, found).await?;
        let result = async {
            read_model.bound(&mut open, ORDER + GRACE).await?;
            read_model.save(&mut open, &record, found, to).await.map_err(refused(self.context))?;
            if !rebuilding {
                let transaction = read_model.transaction(&mut open);
                let discarded = catch_panic(async { projection.drop_version(transaction).await }).await;
                discarded.map_err(|error| blame(context, read_model, &error))?;
            }
            let Some((request, found)) = asked else { return Ok(()) };
            match read_model.save(&mut open, request, found, bump(found)).await {
                Ok(()) => read_model.unpark(&mut open, request, Position::START).await.map(drop)?,
                // The request was made again meanwhile, and is executed again.
                Err(CheckpointError::Stale { .. }) => {}
                Err(CheckpointError::Store(error)) => return Err(error.into()),
            }
            Ok(())
        };
        match timeout(ORDER, result).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.roll_back(open).await;
                return Err(error);
            }
            Err(_) => return Err(self.locked(ORDER, "could not be dropped")),
        }
        self.read_model.commit(open, &record, to, to, None).await.map_err(refused(self.context))
    }

    /// Returns the error for a wait for locked tables beyond the limit.
    ///
    /// The transaction is dropped and not rolled back here, because the rollback would wait for the
    /// same lock. If the database continues to wait, its own [limit](ReadModel::bound) ends that.
    pub(super) fn locked(&self, limit: Duration, what: &str) -> ControlError {
        let reason = format!("within {limit:?}, the tables of the rebuilt version {what}");
        ControlError::Refused { name: self.context.name.clone(), reason }
    }
}
