//! Versions of a read model: the one that is live, and the one that is built beside it until it takes its place.
//!
//! Each version has tables and checkpoints of its own. Those who build it are tasks beside those who keep the live one up to
//! date, with leases of their own; so both survive the death of any node. The switch is one transaction, under which the tasks
//! exchange nothing: all of them look up which version is theirs, and go on from its checkpoint.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::apply::contained;
use super::orders::{Change, GRACE, ORDER, blame, refused};
use super::{Context, Run};
use crate::event::Position;
use crate::projection::shape::{Versions, fenced};
use crate::projection::{ControlError, Projection, ProjectionState, ReadModel};
use crate::store::{Checkpoint, CheckpointError, StoreError};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    /// Works on the version that is this task's by now.
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
                    found: format!("version {version}: it was rebuilt"),
                    advice: "register the projection as rebuildable, so that it writes to the version that is live".into(),
                });
            };
            instance.projection = make(version);
            instance.version = version;
            // How another version got on says nothing of this one.
            self.paces.clear();
            self.switch_again.succeeded();
            context.status.send_modify(|status| status.measured = None);
        }
        self.row = context.shape.row(context.partition, version);
        context.status.send_modify(|status| status.version = version);
        Ok(())
    }

    /// There is nothing to do until somebody says so.
    pub(super) async fn sleep(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.release().await;
        }
        self.context.set(ProjectionState::Standby);
        self.idle(self.tick_at).await;
    }

    /// For the pace that this node sees.
    pub(super) fn measures_from(&mut self, position: Position) {
        self.context.status.send_modify(|status| {
            status.measured.get_or_insert((Instant::now(), position));
        });
    }

    /// Begins to build the next version, unless one is being built already. If `requested` there, only if it is still.
    pub(super) async fn rebuild(&mut self, requested: Option<&str>) -> Result<(), ControlError> {
        self.create().await?;
        self.rebuildable()?;
        match self.patiently(Change::BeginRebuild { requested }).await? {
            true => self.tell_all().await,
            false => Ok(()),
        }
    }

    /// Makes the projection that writes to a version.
    fn rebuildable(&self) -> Result<&(dyn Fn(u64) -> P + Send + Sync), ControlError> {
        let not = |reason| ControlError::NotRebuildable { name: self.context.name.clone(), reason };
        if !self.read_model.rolls_back() || !self.read_model.shared() {
            return Err(not("what it writes cannot be switched in a transaction; reset it instead"));
        }
        self.instance.make.as_deref().ok_or_else(|| {
            not("it was registered with one place to write to; register it with Builder::rebuildable")
        })
    }

    /// Whether that is still wanted.
    pub(super) async fn begin_rebuild(&mut self, requested: Option<&str>) -> Result<bool, ControlError> {
        let (context, read_model) = (self.context, self.read_model);
        let record = context.shape.version();
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
            // First, and held until the end: what was built before may be discarded just now.
            read_model.save(&mut open, &record, found, wanted).await.map_err(refused)?;
            let transaction = read_model.transaction(&mut open);
            let created = contained(async { projection.reset(transaction).await }).await;
            created.map_err(|error| blame(context, read_model, &error))?;
            // Last: who waits in vain above does not hold the request, and can still refuse it.
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
            Err(_) => return Err(self.locked(ORDER, "could not be made yet; ask for the rebuild again")),
        }
        self.read_model.commit(open, &record, wanted, wanted, None).await.map_err(refused)?;
        tracing::info!(
            projection = context.name,
            version = next,
            "the read model is rebuilt beside the live one"
        );
        Ok(true)
    }

    /// What was asked for is so already: the request goes, if that is still so. Whether it was still wanted.
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
                self.read_model.commit(open, record, found, found, None).await.map_err(refused)?;
                Ok(true)
            }
            other => {
                self.roll_back(open).await;
                Ok(other?)
            }
        }
    }

    /// Gives up what is being built, if anything is. If `requested` there, only if it is still.
    pub(super) async fn cancel_rebuild(&mut self, requested: Option<&str>) -> Result<(), ControlError> {
        self.create().await?;
        self.rebuildable()?;
        let asked = match requested {
            // Whoever asks again while this is under way moves it.
            Some(row) => Some((row, self.read_model.checkpoint(row).await?)),
            None => None,
        };
        if !self.patiently(Change::EndRebuild { requested }).await? {
            return Ok(());
        }
        let dropped = async {
            self.tell_all().await?;
            // Those who were in the middle of it cannot commit any more, and have let go of its tables or are about to.
            self.patiently(Change::Discard { asked }).await
        };
        dropped.await.map(drop).map_err(|error| {
            let reason = match error {
                ControlError::Refused { reason, .. } => reason,
                error => error.to_string(),
            };
            let reason = format!(
                "the rebuild is cancelled, but what it had built is still there: {reason}; cancel it again to drop that"
            );
            ControlError::Refused { name: self.context.name.clone(), reason }
        })
    }

    /// Nobody builds a version any more; its checkpoints are where the next one to be built begins. Whether that is still wanted;
    /// the request stands until what was built is dropped, too.
    pub(super) async fn end_rebuild(&mut self, requested: Option<&str>) -> Result<bool, ControlError> {
        let (Context { shape, name, .. }, read_model) = (self.context, self.read_model);
        let record = shape.version();
        let found = self.read_model.checkpoint(&record).await?;
        let versions = Versions::from(found);
        if let Some(request) = requested
            && ReadModel::parked(read_model, request, 1).await?.iter().all(|kept| kept.attempts > 0)
        {
            return Ok(false);
        }
        let Some(version) = versions.rebuilt else { return Ok(true) };
        let ended = Versions { rebuilt: None, ..versions }.record(found);
        // In as many parts as it was begun with, however many this program wants. That number stays while a version is being
        // built, and is looked up outside of the transaction, which would need a second connection for it.
        let parts: Vec<_> = shape.as_recorded(read_model).await?.parts().collect();
        let mut open = self.read_model.begin(&record, found).await?;
        let result = async {
            read_model.save(&mut open, &record, found, ended).await.map_err(refused)?;
            for part in parts {
                let row = shape.row(part, version);
                let found = read_model.adopt(&mut open, &row).await?;
                let anew = Checkpoint { position: Position::START, ..fenced(found) };
                self.read_model.save(&mut open, &row, found, anew).await.map_err(refused)?;
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
        self.read_model.commit(open, &record, ended, ended, None).await.map_err(refused)?;
        tracing::info!(projection = name, version, "the rebuild was cancelled");
        Ok(true)
    }

    /// Drops what was built of the version that would be the next, unless somebody begins to build it again.
    pub(super) async fn discard(&mut self, asked: Option<(&str, Checkpoint)>) -> Result<(), ControlError> {
        let (context, read_model) = (self.context, self.read_model);
        let record = context.shape.version();
        let found = read_model.checkpoint(&record).await?;
        let versions = Versions::from(found);
        let again = versions.rebuilt.is_some();
        if again && asked.is_none() {
            return Ok(());
        }
        let mut projection = self.rebuildable()?(versions.next());
        // Nothing that anybody reads, but who knows it as it was is refused, and waits for the end of this.
        let to = Checkpoint { position: Position::new(found.position.get() + 1), ..found };
        let mut open = self.read_model.begin(&record, found).await?;
        let result = async {
            read_model.bound(&mut open, ORDER + GRACE).await?;
            read_model.save(&mut open, &record, found, to).await.map_err(refused)?;
            if !again {
                let transaction = read_model.transaction(&mut open);
                let discarded = contained(async { projection.discard(transaction).await }).await;
                discarded.map_err(|error| blame(context, read_model, &error))?;
            }
            let Some((request, found)) = asked else { return Ok(()) };
            match read_model.save(&mut open, request, found, fenced(found)).await {
                Ok(()) => read_model.unpark(&mut open, request, Position::START).await.map(drop)?,
                // It was asked for again meanwhile, and is done again.
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
        self.read_model.commit(open, &record, to, to, None).await.map_err(refused)
    }

    /// Somebody else holds the tables for longer than this waits. The transaction is dropped and not rolled back here: that would
    /// wait for the same. Where the database waits on, it is [bound](ReadModel::bound).
    pub(super) fn locked(&self, limit: Duration, what: &str) -> ControlError {
        let reason = format!("within {limit:?}, the tables of the version that is rebuilt {what}");
        ControlError::Refused { name: self.context.name.clone(), reason }
    }
}
