//! The cut-over: the rebuilt version becomes the live one, while the tasks of the live one wait.

use std::mem::replace;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::change::{blame, refused, versions_changed};
use super::context::GRACE;
use super::context::TaskConfig;
use super::rebuild::{RETRY_PAUSE, RebuildProgress, Switch};
use super::task::ProjectionTask;
use super::user_code::catch_panic;
use crate::projection::{ControlError, Projection, ReadModel};
use crate::store::{Checkpoint, ProgressWrite, StoreError, StoredProjection};

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
        if !first || self.state.lease().is_none() || !self.state.is_live() {
            return self.give_up_switching().await;
        }
        if let Err(error) = self.go_on_switching().await {
            tracing::warn!(projection = self.context.name, %error, "could not cut over to the rebuilt version; retrying");
            self.context.status.send_modify(|status| status.last_error = Some(error.to_string()));
            let wait = self.rebuild.backoff.next();
            self.switch_later(wait).await;
        }
    }

    async fn go_on_switching(&mut self) -> Result<(), ControlError> {
        let since = match &self.rebuild.switch {
            Switch::Waits { since, .. } => Some(*since),
            Switch::None | Switch::Later(_) => None,
        };
        let (behind, is_advancing) = self.behind(since).await?;
        match &self.rebuild.switch {
            Switch::Later(at) if *at > Instant::now() => {}
            Switch::Waits { since, .. } => {
                let waited = since.elapsed();
                self.tick_at = Instant::now() + SWITCHING;
                if behind == 0 {
                    self.cut_over().await?;
                    self.rebuild.backoff.succeeded();
                    match self.announce("cut-over").await {
                        true => self.give_up_switching().await,
                        false => self.rebuild.switch = Switch::None,
                    }
                    self.reload();
                    self.tick_at = Instant::now();
                } else if !is_advancing || waited >= WAIT {
                    self.switch_later(RETRY_PAUSE).await;
                }
            }
            _ if behind == 0 || (behind <= NEAR && is_advancing) => {
                let order = self.order().await?;
                self.rebuild.switch = Switch::Waits { order, since: Instant::now() };
                self.tick_at = Instant::now() + SWITCHING;
            }
            _ => {}
        }
        Ok(())
    }

    async fn switch_later(&mut self, wait: Duration) {
        self.give_up_switching().await;
        self.rebuild.switch = Switch::Later(Instant::now() + wait);
    }

    pub(super) async fn give_up_switching(&mut self) {
        if let Switch::Waits { order, .. } = replace(&mut self.rebuild.switch, Switch::None) {
            if let Err(error) = self.context.store.release_lease(&order).await {
                tracing::warn!(projection = self.context.name, %error, "could not release the order lease; the projection is held up until it expires");
            }
            self.context.lease_watcher.hint();
        }
    }

    /// Returns the largest lag of a partition, and whether all lagging partitions advance.
    async fn behind(&mut self, since: Option<Instant>) -> Result<(u64, bool), StoreError> {
        let TaskConfig { layout, name, .. } = self.context;
        let live = self.read_model.projection(name).await?.live_version;
        let (mut most, mut all_get_on) = (0, true);
        for (index, (old, new)) in layout.keys(live).zip(layout.keys(self.instance.version)).enumerate() {
            let old = self.read_model.checkpoint(&old).await?.position;
            let new = self.read_model.checkpoint(&new).await?.position;
            let progress = &mut self.rebuild.progress;
            if progress.len() <= index {
                progress.push(RebuildProgress::default());
            }
            let pace = &mut progress[index];
            pace.at(new);
            if new < old {
                most = most.max(old.get() - new.get());
                all_get_on &= pace.is_advancing(since);
            }
        }
        Ok((most, all_get_on))
    }

    async fn cut_over(&mut self) -> Result<(), ControlError> {
        let (TaskConfig { layout, name, .. }, read_model) = (self.context, self.read_model);
        let version = self.instance.version;
        let mut open = read_model.begin(name, Checkpoint::default(), Some(SWITCH + GRACE)).await?;
        let change = async {
            let found = read_model.adopt(&mut open, name).await?;
            let from = found.projection;
            if from.building_version != Some(version) {
                return Err(versions_changed(self.context, "cutting over"));
            }
            for (old, new) in layout.keys(from.live_version).zip(layout.keys(version)) {
                let lags = found.checkpoint(&new).position < found.checkpoint(&old).position;
                for key in [old, new] {
                    // I7: both are locked until the commit, and owners that know the old values are
                    // fenced.
                    let from = found.checkpoint(&key);
                    let write = ProgressWrite::Checkpoint { key, from, to: from.next_generation() };
                    read_model.write(&mut open, write).await.map_err(refused(self.context))?;
                }
                if lags {
                    let reason = "cutting over failed: the rebuilt version lags the live one again".into();
                    return Err(ControlError::Conflict { name: name.clone(), reason });
                }
            }
            let transaction = read_model.transaction(&mut open);
            let live = catch_panic(async { self.instance.projection.cut_over(transaction).await }).await;
            live.map_err(|error| blame(self.context, &error))?;
            let to = StoredProjection { live_version: version, building_version: None, ..from };
            Ok(Some(vec![ProgressWrite::Projection { name: name.clone(), from, to }]))
        };
        let Ok(change) = timeout(SWITCH, change).await else {
            return Err(self.locked(SWITCH, "could not be cut over"));
        };
        self.end(open, change).await?;
        tracing::info!(projection = name, version, "cut over to the rebuilt version");
        Ok(())
    }
}
