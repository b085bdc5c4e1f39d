//! Versions of a read model: the one that is live, and the one that is built beside it until it takes its place.
//!
//! Each version has tables and checkpoints of its own. Those who build it are tasks beside those who keep the live one up to
//! date, with leases of their own; so both survive the death of any node. The switch is one transaction, under which the tasks
//! exchange nothing: all of them look up which version is theirs, and go on from its checkpoint.

use tokio::time::{Duration, Instant, timeout};

use super::apply::contained;
use super::orders::{Change, ORDER, blame, refused};
use super::{Context, Run, Source};
use crate::event::Position;
use crate::projection::shape::{Versions, fenced};
use crate::projection::{ControlError, Projection, ProjectionState, ReadModel};
use crate::store::{Checkpoint, Lease, StoreError};

/// How far behind the live one the other may be when the live one begins to wait for it.
const NEAR: u64 = 10_000;

/// How long the live one waits at most.
const WAIT: Duration = Duration::from_secs(5);

/// How long after a switch that came to nothing the next one is tried.
const AGAIN: Duration = Duration::from_secs(5);

/// How often it is looked whether what was rebuilt is where the live one is.
const SWITCHING: Duration = Duration::from_millis(20);

/// The live one waits, or did so in vain.
pub(super) struct Switch {
    /// Holds up who keeps the live one up to date.
    order: Option<Lease>,
    /// Until when.
    until: Instant,
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    /// Works on the version that is this task's by now.
    pub(super) async fn find_version(&mut self) -> Result<(), StoreError> {
        let context = self.context;
        let version = context.shape.versions(self.read_model).await?.of(context.role);
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
            Err(_) => return Err(self.locked("could not be made yet; ask for the rebuild again")),
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
        if !self.patiently(Change::EndRebuild { requested }).await? {
            return Ok(());
        }
        self.tell_all().await?;
        // Those who were in the middle of it cannot commit any more, and have let go of its tables or are about to.
        self.patiently(Change::Discard).await.map(drop)
    }

    /// Nobody builds a version any more; its checkpoints are where the next one to be built begins. Whether that is still wanted.
    pub(super) async fn end_rebuild(&mut self, requested: Option<&str>) -> Result<bool, ControlError> {
        let (Context { shape, name, .. }, read_model) = (self.context, self.read_model);
        let record = shape.version();
        let found = self.read_model.checkpoint(&record).await?;
        let versions = Versions::from(found);
        let Some(version) = versions.rebuilt else {
            return self.nothing_to_do(requested, &record, found).await;
        };
        let ended = Versions { rebuilt: None, ..versions }.record(found);
        // In as many parts as it was begun with, however many this program wants. That number stays while a version is being
        // built, and is looked up outside of the transaction, which would need a second connection for it.
        let parts: Vec<_> = shape.as_recorded(read_model).await?.parts().collect();
        let mut open = self.read_model.begin(&record, found).await?;
        let result = async {
            if let Some(request) = requested
                && !read_model.unpark(&mut open, request, Position::START).await?
            {
                return Ok(false);
            }
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
    pub(super) async fn discard(&mut self) -> Result<(), ControlError> {
        let (context, read_model) = (self.context, self.read_model);
        let record = context.shape.version();
        let found = read_model.checkpoint(&record).await?;
        let versions = Versions::from(found);
        if versions.rebuilt.is_some() {
            return Ok(());
        }
        let mut projection = self.rebuildable()?(versions.next());
        // Nothing that anybody reads, but who knows it as it was is refused, and waits for the end of this.
        let to = Checkpoint { position: Position::new(found.position.get() + 1), ..found };
        let mut open = self.read_model.begin(&record, found).await?;
        let result = async {
            read_model.save(&mut open, &record, found, to).await.map_err(refused)?;
            let transaction = read_model.transaction(&mut open);
            let discarded = contained(async { projection.discard(transaction).await }).await;
            discarded.map_err(|error| blame(context, read_model, &error))
        };
        match timeout(ORDER, result).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.roll_back(open).await;
                return Err(error);
            }
            Err(_) => return Err(self.locked("could not be dropped yet; cancel the rebuild again")),
        }
        self.read_model.commit(open, &record, to, to, None).await.map_err(refused)
    }

    /// Somebody else holds the tables of the next version for longer than this waits. The transaction is dropped and not rolled
    /// back here: that would wait for the same.
    fn locked(&self, what: &str) -> ControlError {
        let reason = format!("within {ORDER:?}, the tables of the version that is rebuilt {what}");
        ControlError::Refused { name: self.context.name.clone(), reason }
    }

    /// Puts what was rebuilt in the place of what is live, if it has come as far. One partition sees to it for all.
    pub(super) async fn consider_switching(&mut self) {
        let first = self.context.partition.is_none_or(|partition| partition.index() == 0);
        let ready = first
            && !self.dormant
            && self.lease.is_some()
            && self.saved.is_some()
            && self.source == Source::Feed;
        if !ready {
            return self.give_up_switching().await;
        }
        if let Err(error) = self.go_on_switching().await {
            tracing::warn!(projection = self.context.name, %error, "what was rebuilt could not be put in place, and is tried again");
            self.context.status.send_modify(|status| status.last_error = Some(error.to_string()));
            self.give_up_switching().await;
            self.switch = Some(Switch { order: None, until: Instant::now() + AGAIN });
        }
    }

    async fn go_on_switching(&mut self) -> Result<(), ControlError> {
        let behind = self.behind().await?;
        match &self.switch {
            Some(Switch { order: None, until }) if *until > Instant::now() => return Ok(()),
            Some(Switch { order: Some(_), until }) => {
                self.tick_at = Instant::now() + SWITCHING;
                if behind == 0 {
                    self.put_in_place().await?;
                    self.give_up_switching().await;
                    self.reload();
                    self.tick_at = Instant::now();
                } else if *until <= Instant::now() {
                    self.give_up_switching().await;
                    self.switch = Some(Switch { order: None, until: Instant::now() + AGAIN });
                }
            }
            _ if behind <= NEAR => {
                let order = Some(self.order().await?);
                self.context.board.hint();
                self.switch = Some(Switch { order, until: Instant::now() + WAIT });
                self.tick_at = Instant::now() + SWITCHING;
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) async fn give_up_switching(&mut self) {
        if let Some(Switch { order: Some(order), .. }) = self.switch.take() {
            if let Err(error) = self.context.store.release_lease(&order).await {
                tracing::warn!(projection = self.context.name, %error, "who works on the projection is held up for some seconds");
            }
            self.context.board.hint();
        }
    }

    /// How far the furthest of all partitions is behind the live one.
    async fn behind(&mut self) -> Result<u64, StoreError> {
        let shape = &self.context.shape;
        let Versions { live, .. } = shape.versions(self.read_model).await?;
        let mut most = 0;
        for part in shape.parts() {
            let old = self.read_model.checkpoint(&shape.row(part, live)).await?.position;
            let new = self.read_model.checkpoint(&shape.row(part, self.instance.version)).await?.position;
            most = most.max(old.get().saturating_sub(new.get()));
        }
        Ok(most)
    }

    async fn put_in_place(&mut self) -> Result<(), ControlError> {
        let context = self.context;
        let (shape, version) = (&context.shape, self.instance.version);
        let record = shape.version();
        let found = self.read_model.checkpoint(&record).await?;
        let mut open = self.read_model.begin(&record, found).await?;
        let Versions { live, rebuilt } = Versions::from(found);
        let result = async {
            if rebuilt != Some(version) {
                return Err(late("the versions have changed"));
            }
            for part in shape.parts() {
                // Both are held until the end, and whoever knows them as they were is refused.
                let (old_row, new_row) = (shape.row(part, live), shape.row(part, version));
                let old = self.read_model.adopt(&mut open, &old_row).await?;
                let new = self.read_model.adopt(&mut open, &new_row).await?;
                self.read_model.save(&mut open, &old_row, old, fenced(old)).await.map_err(refused)?;
                self.read_model.save(&mut open, &new_row, new, fenced(new)).await.map_err(refused)?;
                if new.position < old.position {
                    return Err(late("it is behind the live one again"));
                }
            }
            let transaction = self.read_model.transaction(&mut open);
            let live = contained(async { self.instance.projection.go_live(transaction).await }).await;
            live.map_err(|error| blame(self.context, self.read_model, &error))
        };
        if let Err(error) = result.await {
            self.roll_back(open).await;
            return Err(error);
        }
        let switched: Checkpoint = Versions { live: version, rebuilt: None }.record(found);
        self.read_model.commit(open, &record, found, switched, None).await.map_err(refused)?;
        tracing::info!(projection = context.name, version, "what was rebuilt is live");
        Ok(())
    }
}

fn late(reason: &str) -> ControlError {
    ControlError::Store(StoreError::Unavailable { reason: reason.to_owned(), source: None })
}
