//! Remote dispatch of one command: the choice of nodes, and the answer to the caller.

mod attempt;
mod dispatch_loop;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ractor::concurrency::{OneshotReceiver, oneshot};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use self::dispatch_loop::{Accepted, DispatchLoop};
use super::shared::Shared;
use crate::command::envelope::Deadline;
use crate::command::wire::{CommandFrame, Outcome};

type Ended = (Outcome, Duration);

/// The dispatch of a command to one node after another until one has answered it.
pub(super) struct RemoteDispatch {
    inner: DispatchLoop,
    permit: OwnedSemaphorePermit,
}

impl RemoteDispatch {
    pub(super) fn new(
        shared: Arc<Shared>,
        frame: CommandFrame,
        assign: Deadline,
        deadline: Deadline,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        let inner = DispatchLoop {
            replies: shared.calls.replies(),
            link: shared.link.subscribe(),
            frame,
            assign,
            deadline,
            excluded: HashSet::new(),
            attempts: Vec::new(),
            unresolved: BTreeMap::new(),
            refusal: None,
            accepted: false,
            on_accept: None,
            shared,
        };
        Self { inner, permit }
    }

    /// Dispatches the command. Dropping the future ends the dispatch.
    pub(super) async fn run(mut self) -> Ended {
        let started = Instant::now();
        let (outcome, runtime) = self.inner.run().await;
        drop(self.permit);
        (outcome, runtime.unwrap_or(started.elapsed()))
    }

    /// Dispatches the command in a task of its own.
    ///
    /// The first receiver resolves when a node has accepted the command, or when none will; the
    /// second one resolves at the end.
    pub(super) fn spawn(mut self) -> (OneshotReceiver<Accepted>, OneshotReceiver<Ended>) {
        let (on_accept, is_accepted) = oneshot();
        let (done, is_done) = oneshot();
        self.inner.on_accept = Some(on_accept);
        tokio::spawn(async move {
            let started = Instant::now();
            let (outcome, runtime) = self.inner.run().await;
            if let Some(on_accept) = self.inner.on_accept.take() {
                let _ = on_accept.send(match &outcome {
                    Outcome::Error(failure) if !failure.is_answer() => Err(failure.clone()),
                    _ => Ok(()),
                });
            }
            if let Err((Outcome::Error(failure), _)) =
                done.send((outcome, runtime.unwrap_or(started.elapsed())))
            {
                tracing::warn!(?failure, "command failed after its caller stopped waiting");
            }
            drop(self.permit);
        });
        (is_accepted, is_done)
    }
}
