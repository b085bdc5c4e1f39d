//! The cut-over: the rebuilt version becomes the live one, while the tasks of the live one wait.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::change::{GRACE, blame, refused};
use super::rebuild::{RETRY_PAUSE, RebuildProgress, Switch};
use super::task::{ProjectionTask, Source};
use super::user_code::catch_panic;
use crate::projection::layout::{Versions, bump};
use crate::projection::{ControlError, Projection, ReadModel};
use crate::store::{Checkpoint, StoreError};

/// Maximum distance in positions between the versions at which the live one begins to wait.
const NEAR: u64 = 10_000;

/// Maximum wait of the live version.
const WAIT: Duration = Duration::from_secs(5);

/// Maximum wait of the cut-over transaction for locks of other sessions.
///
/// Meanwhile the tasks of the live version wait, and readers of the tables wait for its own locks.
const SWITCH: Duration = Duration::from_secs(2);

/// Interval of checking whether the rebuilt version has reached the live one.
const SWITCHING: Duration = Duration::from_millis(20);

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Cuts over if the rebuilt version has caught up. One partition acts for all.
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
            tracing::warn!(projection = self.context.name, %error, "could not cut over to the rebuilt version; retrying");
            self.context.status.send_modify(|status| status.last_error = Some(error.to_string()));
            let wait = self.switch_backoff.next();
            self.switch_later(wait).await;
        }
    }

    async fn go_on_switching(&mut self) -> Result<(), ControlError> {
        let since = match &self.switch {
            Some(Switch::Waits { since, .. }) => Some(*since),
            _ => None,
        };
        let (behind, is_advancing) = self.behind(since).await?;
        match &self.switch {
            Some(Switch::Later(at)) if *at > Instant::now() => {}
            Some(Switch::Waits { since, .. }) => {
                let waited = since.elapsed();
                self.tick_at = Instant::now() + SWITCHING;
                if behind == 0 {
                    self.cut_over().await?;
                    self.switch_backoff.succeeded();
                    self.give_up_switching().await;
                    self.reload();
                    self.tick_at = Instant::now();
                } else if !is_advancing || waited >= WAIT {
                    self.switch_later(RETRY_PAUSE).await;
                }
            }
            _ if behind == 0 || (behind <= NEAR && is_advancing) => {
                let order = self.order().await?;
                self.context.lease_watcher.hint();
                self.switch = Some(Switch::Waits { order, since: Instant::now() });
                self.tick_at = Instant::now() + SWITCHING;
            }
            _ => {}
        }
        Ok(())
    }

    async fn switch_later(&mut self, wait: Duration) {
        self.give_up_switching().await;
        self.switch = Some(Switch::Later(Instant::now() + wait));
    }

    pub(super) async fn give_up_switching(&mut self) {
        if let Some(Switch::Waits { order, .. }) = self.switch.take() {
            if let Err(error) = self.context.store.release_lease(&order).await {
                tracing::warn!(projection = self.context.name, %error, "could not release the order lease; the projection is held up until it expires");
            }
            self.context.lease_watcher.hint();
        }
    }

    /// Returns the largest lag of a partition, and whether all lagging partitions advance.
    async fn behind(&mut self, since: Option<Instant>) -> Result<(u64, bool), StoreError> {
        let layout = &self.context.layout;
        let Versions { live, .. } = layout.versions(self.read_model).await?;
        let (mut most, mut all_get_on) = (0, true);
        for (index, part) in layout.parts().enumerate() {
            let old = self.read_model.checkpoint(&layout.row(part, live)).await?.position;
            let new = self.read_model.checkpoint(&layout.row(part, self.instance.version)).await?.position;
            if self.rebuild_progress.len() <= index {
                self.rebuild_progress.push(RebuildProgress::default());
            }
            let pace = &mut self.rebuild_progress[index];
            pace.at(new);
            if new < old {
                most = most.max(old.get() - new.get());
                all_get_on &= pace.is_advancing(since);
            }
        }
        Ok((most, all_get_on))
    }

    async fn cut_over(&mut self) -> Result<(), ControlError> {
        let context = self.context;
        let (layout, version) = (&context.layout, self.instance.version);
        let record = layout.version();
        let found = self.read_model.checkpoint(&record).await?;
        let mut open = self.read_model.begin(&record, found).await?;
        let Versions { live, rebuilt } = Versions::from(found);
        let late =
            |reason: &str| ControlError::Conflict { name: context.name.clone(), reason: reason.to_owned() };
        let result = async {
            self.read_model.bound(&mut open, SWITCH + GRACE).await?;
            if rebuilt != Some(version) {
                return Err(late("cutting over failed: the versions have changed"));
            }
            for part in layout.parts() {
                // I7: both are locked until the commit, and owners that know the old values are
                // fenced.
                let (old_row, new_row) = (layout.row(part, live), layout.row(part, version));
                let old = self.read_model.adopt(&mut open, &old_row).await?;
                let new = self.read_model.adopt(&mut open, &new_row).await?;
                self.read_model
                    .save(&mut open, &old_row, old, bump(old))
                    .await
                    .map_err(refused(self.context))?;
                self.read_model
                    .save(&mut open, &new_row, new, bump(new))
                    .await
                    .map_err(refused(self.context))?;
                if new.position < old.position {
                    return Err(late("cutting over failed: the rebuilt version lags the live one again"));
                }
            }
            let transaction = self.read_model.transaction(&mut open);
            let live = catch_panic(async { self.instance.projection.cut_over(transaction).await }).await;
            live.map_err(|error| blame(self.context, self.read_model, &error))
        };
        match timeout(SWITCH, result).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.roll_back(open).await;
                return Err(error);
            }
            Err(_) => return Err(self.locked(SWITCH, "could not be cut over")),
        }
        let switched: Checkpoint = Versions { live: version, rebuilt: None }.record(found);
        self.read_model.commit(open, &record, found, switched, None).await.map_err(refused(self.context))?;
        tracing::info!(projection = context.name, version, "cut over to the rebuilt version");
        Ok(())
    }
}
