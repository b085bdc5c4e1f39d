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
    place: OwnedSemaphorePermit,
}

impl RemoteDispatch {
    pub(super) fn new(
        shared: Arc<Shared>,
        frame: CommandFrame,
        assign: Deadline,
        deadline: Deadline,
        place: OwnedSemaphorePermit,
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
            tell: None,
            shared,
        };
        Self { inner, place }
    }

    /// Dispatches the command. Dropping the future ends the dispatch.
    pub(super) async fn run(mut self) -> Ended {
        let started = Instant::now();
        let (outcome, runtime) = self.inner.run().await;
        drop(self.place);
        (outcome, runtime.unwrap_or(started.elapsed()))
    }

    /// Dispatches the command in a task of its own.
    ///
    /// The first receiver resolves when a node has accepted the command, or when none will; the
    /// second one resolves at the end.
    pub(super) fn spawn(mut self) -> (OneshotReceiver<Accepted>, OneshotReceiver<Ended>) {
        let (tell, is_accepted) = oneshot();
        let (done, is_done) = oneshot();
        self.inner.tell = Some(tell);
        tokio::spawn(async move {
            let started = Instant::now();
            let (outcome, runtime) = self.inner.run().await;
            if let Some(tell) = self.inner.tell.take() {
                let _ = tell.send(match &outcome {
                    Outcome::Error(failure) if !failure.is_answer() => Err(failure.clone()),
                    _ => Ok(()),
                });
            }
            if let Err((Outcome::Error(failure), _)) =
                done.send((outcome, runtime.unwrap_or(started.elapsed())))
            {
                tracing::warn!(?failure, "command failed after its caller stopped waiting");
            }
            drop(self.place);
        });
        (is_accepted, is_done)
    }
}
