//! Notifies a task of new lease views and of changes of its permit.

use tokio::sync::watch;

use crate::lease::Observation;

/// Notifications to a task, besides its input.
pub(super) struct News {
    pub(super) observations: watch::Receiver<Observation>,
    pub(super) permit: Option<watch::Receiver<bool>>,
}

impl News {
    pub(super) fn new(
        observations: &watch::Receiver<Observation>,
        permit: Option<&watch::Receiver<bool>>,
    ) -> Self {
        let mut news = Self { observations: observations.clone(), permit: permit.cloned() };
        // The initial state counts as a change.
        news.observations.mark_changed();
        news
    }

    pub(super) fn has_changed(&self) -> bool {
        // An error means that the node is stopping.
        self.observations.has_changed().unwrap_or(false)
            || self.permit.as_ref().is_some_and(|permit| permit.has_changed().unwrap_or(false))
    }

    /// Waits for a change. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        let Self { observations, permit } = self;
        let permit = async {
            match permit {
                Some(permit) => permit.changed().await,
                None => std::future::pending().await,
            }
        };
        let changed = tokio::select! {
            changed = observations.changed() => changed,
            changed = permit => changed,
        };
        if changed.is_err() {
            // The node is stopping, and this task with it.
            std::future::pending::<()>().await;
        }
    }

    /// Returns whether this node may own the partition.
    pub(super) fn permits(&self) -> bool {
        self.permit.as_ref().is_none_or(|permit| *permit.borrow())
    }
}
