//! Versions of a read model: the live one, and the one that is built until the cut-over.
//!
//! Each version has tables and checkpoints of its own. The tasks that build a version run beside
//! the tasks of the live one, with leases of their own, so both survive the death of any node. The
//! cut-over is one transaction, in which the tasks exchange nothing: each task looks up its version
//! and continues from its checkpoint.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::change::{Change, ORDER, blame, interrupted, refused, versions_changed};
use super::context::GRACE;
use super::context::TaskConfig;
use super::task::ProjectionTask;
use super::user_code::catch_panic;
use crate::event::Position;
use crate::projection::layout::Layout;
use crate::projection::{ControlError, Projection, ReadModel};
use crate::store::{Checkpoint, ProgressWrite, StoreError, StoredProjection, StoredRequest};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Switches to the current version for this task's role; returns whether there is one.
    pub(super) fn find_version(&mut self, projection: &StoredProjection) -> Result<bool, StoreError> {
        let context = self.context;
        let version = context.role.version(projection);
        context.status.send_if_modified(|status| {
            if version.is_none() {
                status.measured = None;
            }
            std::mem::replace(&mut status.dormant, version.is_none()) != version.is_none()
        });
        if let Some(version) = version {
            self.use_version(version)?;
        }
        Ok(version.is_some())
    }

    pub(super) fn use_version(&mut self, version: u64) -> Result<(), StoreError> {
        let Self { context, instance, .. } = self;
        if instance.version != version {
            let Some(make) = &instance.make else {
                return Err(StoreError::Incompatible {
                    expected: format!("the read model of projection {} in version 0", context.name),
                    found: format!("version {version}, made by a rebuild"),
                    advice: "register the projection with PerTarget::new(…), so that it writes to the live version"
                        .into(),
                });
            };
            instance.projection = make(version);
            instance.version = version;
            // The progress of another version does not apply to this one.
            self.rebuild.progress.clear();
            self.rebuild.backoff.succeeded();
            context.status.send_modify(|status| status.measured = None);
        }
        self.key = context.layout.key(context.partition, version);
        context.status.send_modify(|status| status.version = version);
        Ok(())
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
    pub(super) async fn rebuild(&mut self, requested: Option<&StoredRequest>) -> Result<(), ControlError> {
        self.create().await.map_err(interrupted(self.context))?;
        self.rebuildable()?;
        match self.patiently(Change::BeginRebuild, requested).await? {
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
        self.instance
            .make
            .as_deref()
            .ok_or_else(|| not("it was registered as a single instance; register it with PerTarget::new(…)"))
    }

    /// Begins a rebuild; returns whether the request still existed.
    pub(super) async fn begin_rebuild(
        &mut self,
        requested: Option<&StoredRequest>,
    ) -> Result<bool, ControlError> {
        let (TaskConfig { name, .. }, read_model) = (self.context, self.read_model);
        let found = read_model.projection(name).await?;
        if found.building_version.is_some() {
            if requested.is_none() {
                return Ok(true);
            }
            let mut open = read_model.begin(name, Checkpoint::default(), None).await?;
            let removed = self.remove_request(&mut open, requested).await;
            return self.end(open, removed.map(|removed| removed.then(Vec::new))).await;
        }
        let next = found.live_version + 1;
        let mut projection = self.rebuildable()?(next);
        let mut open = read_model.begin(name, Checkpoint::default(), Some(ORDER + GRACE)).await?;
        let change = async {
            // First, and held until the end: an earlier build may be discarded concurrently.
            let building = StoredProjection { building_version: Some(next), ..found };
            self.change_projection(&mut open, found, building).await?;
            let transaction = read_model.transaction(&mut open);
            let created = catch_panic(async { projection.reset(transaction).await }).await;
            created.map_err(|error| blame(self.context, &error))?;
            // Last: during a vain wait above, the request is not locked and can still be refused.
            Ok(self.remove_request(&mut open, requested).await?.then(Vec::new))
        };
        let Ok(change) = timeout(ORDER, change).await else {
            return Err(self.locked(ORDER, "could not be created; request the rebuild again"));
        };
        let begun = self.end(open, change).await?;
        if begun {
            tracing::info!(
                projection = name,
                version = next,
                "began to rebuild the read model beside the live one"
            );
        }
        Ok(begun)
    }

    /// Writes the versions within a transaction.
    async fn change_projection(
        &mut self,
        open: &mut R::Open,
        from: StoredProjection,
        to: StoredProjection,
    ) -> Result<(), ControlError> {
        let write = ProgressWrite::Projection { name: self.context.name.clone(), from, to };
        self.read_model.write(open, write).await.map_err(refused(self.context))
    }

    /// Cancels the rebuild, if there is one. With `requested`, only if that request still exists.
    pub(super) async fn cancel_rebuild(
        &mut self,
        requested: Option<&StoredRequest>,
    ) -> Result<(), ControlError> {
        self.create().await.map_err(interrupted(self.context))?;
        self.rebuildable()?;
        if !self.patiently(Change::EndRebuild, requested).await? {
            return Ok(());
        }
        let dropped = async {
            self.notify_tasks().await?;
            // Tasks in the middle of a transaction can no longer commit, and have released the
            // tables or are about to.
            self.patiently(Change::DropVersion, requested).await
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
    pub(super) async fn end_rebuild(
        &mut self,
        requested: Option<&StoredRequest>,
    ) -> Result<bool, ControlError> {
        let (context, read_model) = (self.context, self.read_model);
        let TaskConfig { name, .. } = context;
        if let Some(requested) = requested
            && !self.is_waiting(requested).await?
        {
            return Ok(false);
        }
        let Some(version) = read_model.projection(name).await?.building_version else { return Ok(true) };
        let mut open = read_model.begin(name, Checkpoint::default(), None).await?;
        let change = async {
            let found = read_model.adopt(&mut open, name).await?;
            if found.projection.building_version != Some(version) {
                return Err(versions_changed(context, "ending the rebuild"));
            }
            let mut writes = Vec::new();
            // The rebuild has as many parts as it began with, independent of this program's setting.
            for key in Layout::new(name, found.projection.partitions).keys(version) {
                let from = found.checkpoint(&key);
                let to = Checkpoint { position: Position::START, ..from.next_generation() };
                writes.push(ProgressWrite::Checkpoint { key: key.clone(), from, to });
                writes.push(ProgressWrite::UnparkAll { key });
            }
            // After the checkpoints, as at a cut-over: two transactions that lock in different
            // orders would wait for each other.
            let (name, from) = (name.clone(), found.projection);
            let to = StoredProjection { building_version: None, ..from };
            writes.push(ProgressWrite::Projection { name, from, to });
            Ok(Some(writes))
        };
        let change = change.await;
        self.end(open, change).await?;
        tracing::info!(projection = name, version, "cancelled the rebuild");
        Ok(true)
    }

    /// Drops the data of the next version, unless a new rebuild writes to it; deletes the request.
    pub(super) async fn drop_version(
        &mut self,
        requested: Option<&StoredRequest>,
    ) -> Result<bool, ControlError> {
        let (TaskConfig { name, .. }, read_model) = (self.context, self.read_model);
        let found = read_model.projection(name).await?;
        let rebuilding = found.building_version.is_some();
        if rebuilding && requested.is_none() {
            return Ok(true);
        }
        let mut projection = self.rebuildable()?(found.live_version + 1);
        let mut open = read_model.begin(name, Checkpoint::default(), Some(ORDER + GRACE)).await?;
        let change = async {
            // I7: the new revision fences writers that know the old one; they wait for this commit.
            self.change_projection(&mut open, found, found).await?;
            if !rebuilding {
                let transaction = read_model.transaction(&mut open);
                let discarded = catch_panic(async { projection.drop_version(transaction).await }).await;
                discarded.map_err(|error| blame(self.context, &error))?;
            }
            // A request that was made again meanwhile is executed again.
            self.remove_request(&mut open, requested).await?;
            Ok(Some(Vec::new()))
        };
        match timeout(ORDER, change).await {
            Ok(change) => self.end(open, change).await,
            Err(_) => Err(self.locked(ORDER, "could not be dropped")),
        }
    }

    /// Returns the error for a wait for locked tables beyond the limit.
    ///
    /// The transaction is dropped and not rolled back here, because the rollback would wait for the
    /// same lock. If the database continues to wait, its own [limit](ReadModel::begin) ends that.
    pub(super) fn locked(&self, limit: Duration, what: &str) -> ControlError {
        let reason = format!("within {limit:?}, the tables of the rebuilt version {what}");
        ControlError::Refused { name: self.context.name.clone(), reason }
    }
}
