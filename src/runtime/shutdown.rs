//! Shuts a node down in order: scheduler and processes, commands, publisher, projections, feed,
//! supervisor.

use std::time::Duration;

use tokio::time::Instant;

use super::Runtime;
use crate::time::after;

/// Time that [`Runtime::shutdown`] waits for work in progress.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

/// Upper limit of the time that a shutdown reserves for the publisher, and for the projections.
const SHUTDOWN_RESERVE: Duration = Duration::from_secs(2);

/// The components that did not end in time when a runtime was shut down.
///
/// No acknowledged event is lost. The unfinished work was not acknowledged; it continues from its
/// checkpoint at the next start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shutdown incomplete after {timeout:?}: {}", unfinished.join(", "))]
pub struct ShutdownError {
    /// The time limit.
    pub timeout: Duration,
    /// The unfinished components and work.
    pub unfinished: Vec<String>,
}

impl Runtime {
    /// Shuts the node down in order, within 30 s.
    ///
    /// The node accepts no new commands and answers those in progress. The publisher publishes all
    /// committed events, the projections store their checkpoints, and the leases are released. While
    /// the bus is unavailable and events are unpublished, the publisher uses the whole time. See
    /// [`shutdown_within`](Self::shutdown_within) for another time limit.
    ///
    /// # Errors
    /// If a component did not end in time; it was stopped then.
    pub async fn shutdown(self) -> Result<(), ShutdownError> {
        self.shutdown_within(SHUTDOWN_TIMEOUT).await
    }

    /// As [`shutdown`](Self::shutdown), with a time limit.
    ///
    /// # Errors
    /// As [`shutdown`](Self::shutdown).
    pub async fn shutdown_within(self, timeout: Duration) -> Result<(), ShutdownError> {
        // Reserves a part of the time for each later stage. A stuck command or an unreachable bus
        // must not take away the time in which the projections store their checkpoints.
        let reserve = (timeout / 6).min(SHUTDOWN_RESERVE);
        let deadline = after(timeout);
        let until = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        let mut unfinished = Vec::new();
        // First, because the reactions in progress send commands.
        let first = deadline - 3 * reserve;
        let processes = self.inner.processes.iter().map(|process| process.stop(first));
        let scheduler = async {
            match &self.inner.scheduler {
                Some(scheduler) => scheduler.stop(until(first)).await,
                None => Ok(()),
            }
        };
        let (processes, scheduler) = tokio::join!(futures_util::future::join_all(processes), scheduler);
        unfinished.extend(processes.into_iter().flatten());
        unfinished.extend(scheduler.err().map(|error| error.to_string()));
        let commands = self.inner.commands.shut_down(deadline - 2 * reserve).await;
        if commands > 0 {
            unfinished.push(format!("{commands} commands without an answer"));
        }
        if let Some(publisher) = &self.inner.publisher {
            let stopped = publisher.stop(until(deadline - reserve)).await;
            unfinished.extend(stopped.err().map(|error| error.to_string()));
        }
        let stopped = self.inner.projections.iter().map(|projection| projection.stop(until(deadline)));
        for stopped in futures_util::future::join_all(stopped).await {
            unfinished.extend(stopped.err().map(|error| error.to_string()));
        }
        self.inner.feed.stop();
        self.inner.supervisor.stop();
        if unfinished.is_empty() { Ok(()) } else { Err(ShutdownError { timeout, unfinished }) }
    }
}
