//! One decision over several streams: its options and its answer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::dispatched::Watched;
use super::dispatcher::Dispatcher;
use super::envelope::{Envelope, envelope_options};
use super::execute_and_wait::ExecuteAndWait;
use super::hooks::{AfterHooks, CommandInfo};
use super::{Dispatched, ExecuteError, NotExecutedKind, Receipt};
use crate::codec::fingerprint;
use crate::decide::{Decide, DecisionRequest, DecisionResult, decide_and_append};
use crate::event::{EncodeError, Event, StreamId, check_name};
use crate::future::BoxFuture;
use crate::panic::{caught, text_of};
use crate::telemetry::trace::CommandSpan;

/// A decision over several streams. Set its options, then await it for the [`Receipt`].
///
/// [`Runtime::decide`](crate::Runtime::decide) creates it. It starts when it is awaited, on this
/// node. Dropping the waiting future does not cancel it.
///
/// The command id takes effect once for all decisions of the store, in whatever streams. A repeated
/// id gets the first receipt. If the content or the [`NAME`](Decide::NAME) differs, the error is
/// [`CommandIdReused`](NotExecutedKind::CommandIdReused).
///
/// If other writers append matching events, storied decides again, at most 10 times in all, with a
/// growing wait of at most 250 ms. Then the error is
/// [`RetriesExhausted`](NotExecutedKind::RetriesExhausted). If tags stay locked for 10 s on
/// PostgreSQL, the error is [`Store`](NotExecutedKind::Store) with
/// [`StoreError::Unavailable`](crate::StoreError::Unavailable). Both are retryable.
///
/// A node has at most 1,024 decisions in flight. Further callers wait for 1 s, then get
/// [`Overloaded`](NotExecutedKind::Overloaded).
///
/// All views of a decision together have at most 16 items
/// ([`Query::MAX_ITEMS`](crate::store::Query::MAX_ITEMS)) and 64 tags
/// ([`Query::MAX_TAGS`](crate::store::Query::MAX_TAGS)). Its events have at most 64 different tags
/// ([`Append::MAX_TAGS`](crate::store::Append::MAX_TAGS)). It reads at most 100,000 events
/// ([`Query::MAX_EVENTS`](crate::store::Query::MAX_EVENTS)). Above a limit, or if a query is
/// invalid, the error is [`Store`](NotExecutedKind::Store) with
/// [`StoreError::Invalid`](crate::StoreError::Invalid).
#[must_use = "a decision does nothing until it is awaited"]
pub struct ExecuteDecision<D> {
    commands: Arc<Dispatcher>,
    decision: D,
    envelope: Envelope,
}

type Pending<D> = Dispatched<Receipt<<D as Decide>::Reply>, <D as Decide>::Error>;

impl<D: Decide> ExecuteDecision<D> {
    pub(crate) fn new(commands: Arc<Dispatcher>, decision: D) -> Self {
        Self { commands, decision, envelope: Envelope::new() }
    }

    envelope_options!();

    /// Also waits until the projection `name` of this node has applied the decision's events.
    ///
    /// As [`Execute::wait_for`](super::Execute::wait_for). Without events, it waits for the events
    /// that the decision has read.
    pub fn wait_for(self, name: impl Into<String>) -> ExecuteAndWait<D::Reply, D::Error> {
        let (commands, envelope) = (self.commands.clone(), self.envelope.clone());
        ExecuteAndWait::new(commands, &envelope, self.into_future(), name.into())
    }

    /// Returns the stream that gets the events.
    fn stream(&self) -> Result<StreamId, NotExecutedKind> {
        let invalid = |reason: String| NotExecutedKind::InvalidId { reason };
        check_name("decision name", D::NAME).map_err(|error| invalid(error.to_string()))?;
        let id = caught(|| self.decision.stream()).map_err(|panic| {
            let reason = format!("Decide::stream panicked: {panic}");
            NotExecutedKind::NotAccepted { reason }
        })?;
        StreamId::new(D::Event::CATEGORY, id).map_err(|error| invalid(error.to_string()))
    }

    async fn hand_over(mut self) -> Result<Pending<D>, ExecuteError<D::Error>> {
        let stream = self.stream()?;
        let metrics = &self.commands.metrics;
        let watched = Watched::new(metrics, D::NAME, Some(stream.id()), &mut self.envelope);
        let given = self.start(stream, watched.span()).await;
        watched.over(given)
    }

    async fn start(self, stream: StreamId, span: CommandSpan) -> Result<Pending<D>, ExecuteError<D::Error>> {
        let Self { commands, decision, envelope } = self;
        let (id, started, deadline) = (envelope.id, Instant::now(), envelope.deadline().instant());
        commands.check_open(&envelope)?;
        let info = CommandInfo { name: D::NAME, key: Some(stream.id()), id, metadata: &envelope.metadata };
        let not_accepted = |reason| NotExecutedKind::NotAccepted { reason };
        if !commands.hooks.accepts(&info).map_err(not_accepted)? {
            let reason = format!("a filter of this node does not accept decision {id}");
            return Err(not_accepted(reason).into());
        }
        let permit = commands.decisions.admit(id, deadline).await?;
        commands.hooks.before(&info).map_err(not_accepted)?;
        let after = AfterHooks::of(&commands.hooks, &info);
        // Two decisions with one id and equal fields are two commands.
        let content = fingerprint(&(D::NAME, &decision)).map_err(EncodeError::from)?;
        let request = DecisionRequest {
            decision,
            command_id: id,
            stream,
            content: content as u64,
            metadata: envelope.metadata,
            deadline,
            now: Utc::now(),
            span,
        };
        let (store, metrics) = (commands.store.clone(), commands.metrics.clone());
        let (done, answer) = oneshot::channel();
        commands.decisions.spawn(permit, async move {
            let result = decide_and_append(&*store, &metrics, request).await;
            if let Err(Err(error)) = done.send(result) {
                let (decision, error) = (D::NAME, text_of(&error));
                tracing::warn!(decision, command = %id, error, "decision failed after its caller stopped waiting");
            }
        });
        // An error of the channel means that the node stopped.
        let dispatched = Dispatched::here(id, deadline, started, answer);
        Ok(match after {
            Some(after) => after.over(dispatched),
            None => dispatched,
        })
    }
}

impl<D: Decide> IntoFuture for ExecuteDecision<D> {
    type Output = DecisionResult<D>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.hand_over().await?.await })
    }
}

impl<D: Decide> fmt::Debug for ExecuteDecision<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecuteDecision")
            .field("name", &D::NAME)
            .field("command_id", &self.envelope.id)
            .finish_non_exhaustive()
    }
}
