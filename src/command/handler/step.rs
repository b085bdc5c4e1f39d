//! Recorded steps of a handler: calls to systems outside of storied.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use chrono::DateTime;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::HandleError;
use super::context::HandlerContext;
use crate::backoff::Backoff;
use crate::codec::{from_cbor, to_cbor};
use crate::command_id;
use crate::event::id_problem;
use crate::future::BoxFuture;
use crate::store::{CommandRecord, EventStore, StoreError};

/// An error of a recorded step. `E`: the error of the step itself.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StepError<E> {
    /// The step failed. Nothing is recorded: the next attempt runs it again.
    #[error("step {name:?} failed: {error}")]
    Failed {
        /// Name of the step.
        name: String,
        /// Error of the step.
        error: E,
    },
    /// The name of the step is empty, longer than 400 bytes or has a control character. The step
    /// did not run.
    #[error("{0}")]
    InvalidName(String),
    /// The result does not encode. The step ran, and is not recorded.
    #[error("encoding the result of step {name:?} failed: {reason}")]
    Encode {
        /// Name of the step.
        name: String,
        /// Reason.
        reason: String,
    },
    /// The recorded result does not decode as the type of the result.
    #[error("decoding the recorded result of step {name:?} failed: {reason}")]
    Decode {
        /// Name of the step.
        name: String,
        /// Reason.
        reason: String,
    },
    /// The store did not answer until the time limit of the attempt, or refused the record.
    ///
    /// The step may have run, and may be recorded.
    #[error("recording step {name:?} failed: {source}")]
    Store {
        /// Name of the step.
        name: String,
        /// Error of the store.
        source: StoreError,
    },
}

impl<E, F: fmt::Display> From<StepError<F>> for HandleError<E> {
    fn from(error: StepError<F>) -> Self {
        Self::Failed(error.to_string())
    }
}

/// A step of a command: its record has an id of its own.
struct Step<'a> {
    name: &'a str,
    id: Uuid,
    store: &'a dyn EventStore,
    /// End of the attempt.
    deadline: Instant,
}

impl HandlerContext {
    /// Runs a call to another system, and records its result.
    ///
    /// A handler that is attempted after the record gets the recorded result, on every node, and
    /// `step` does not run again. If two attempts run it concurrently, the first record counts for
    /// both. So the flow of the handler may depend on the result.
    ///
    /// `step` gets an id that is the same in every attempt. Pass it to the other system as the key
    /// of the call: an attempt can end after the call and before the record, and the next attempt
    /// then makes the call once more.
    ///
    /// A step that returns an error is not recorded, and the next attempt runs it again. Return a
    /// refusal that the handler acts on, such as a declined card, as a result:
    /// `Ok(Err(declined))`.
    ///
    /// The n-th step with a name is the same one in every attempt. Steps that run concurrently need
    /// different names. A new version of the program must not add, remove or reorder steps of one
    /// name while commands are retried. The record expires after
    /// [`command_retention`](crate::CommandBus::command_retention), also while the command is
    /// retried. Then the step runs again.
    ///
    /// A step keeps the worker slot of the handler
    /// ([`HandlerOptions::workers`](super::HandlerOptions::workers), default: 1).
    ///
    /// ```
    /// # use storied::command::{HandleError, HandlerContext};
    /// # struct Provider;
    /// # impl Provider { async fn charge(&self, key: uuid::Uuid, cents: u64) -> Result<String, std::io::Error> { Ok(key.to_string()) } }
    /// # async fn handle(provider: Provider, cents: u64, context: &HandlerContext) -> Result<String, HandleError<std::io::Error>> {
    /// let receipt = context.run("charge", |key| provider.charge(key, cents)).await?;
    /// # Ok(receipt) }
    /// ```
    ///
    /// # Errors
    /// [`StepError`]. `?` converts it to [`HandleError::Failed`], which ends the attempt.
    ///
    /// # Cancellation safety
    /// If the future is dropped, the step may have run without a record.
    pub async fn run<T, E, F>(&self, name: &str, step: impl FnOnce(Uuid) -> F) -> Result<T, StepError<E>>
    where
        T: Serialize + DeserializeOwned,
        F: Future<Output = Result<T, E>>,
    {
        if let Some(problem) = id_problem("name of a step", name) {
            return Err(StepError::InvalidName(problem));
        }
        let recorded = self.step(name);
        let before = recorded.retrying(|| recorded.store.command(recorded.id)).await;
        if let Some(record) = before.map_err(|source| recorded.failed(source))? {
            return recorded.result(&record);
        }
        let result = step(recorded.id).await;
        let result = result.map_err(|error| StepError::Failed { name: name.to_owned(), error })?;
        let encoded = to_cbor(&result)
            .map_err(|error| StepError::Encode { name: name.to_owned(), reason: error.to_string() })?;
        let record = recorded.record(encoded.into());
        let first = recorded.retrying(|| recorded.store.record_command(record.clone())).await;
        recorded.result(&first.map_err(|source| recorded.failed(source))?)
    }

    fn step<'a>(&'a self, name: &'a str) -> Step<'a> {
        let id = command_id::derived(self.command_id(), &self.next_of(format!("step {name}")));
        Step { name, id, store: &*self.commands.store, deadline: self.deadline() }
    }
}

impl<'a> Step<'a> {
    fn record(&self, outcome: Bytes) -> CommandRecord {
        let name = self.name.to_owned();
        let recorded_at = DateTime::UNIX_EPOCH;
        CommandRecord { id: self.id, name, fingerprint: self.id, outcome, recorded_at }
    }

    /// Decodes the recorded result. The first attempt does this too, so that it gets what later ones
    /// get.
    fn result<T: DeserializeOwned, E>(&self, record: &CommandRecord) -> Result<T, StepError<E>> {
        from_cbor(&record.outcome)
            .map_err(|error| StepError::Decode { name: self.name.to_owned(), reason: error.to_string() })
    }

    fn failed<E>(&self, source: StoreError) -> StepError<E> {
        StepError::Store { name: self.name.to_owned(), source }
    }

    /// Repeats an idempotent call until the end of the attempt: after an outage of the store, the
    /// other system should not have to be called again.
    async fn retrying<T>(
        &self,
        call: impl Fn() -> BoxFuture<'a, Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        loop {
            let error = match call().await {
                Err(error) if error.is_transient() => error,
                answer => return answer,
            };
            let wait = backoff.next();
            if Instant::now() + wait >= self.deadline {
                return Err(error);
            }
            tracing::warn!(step = self.name, %error, ?wait, "retrying the record of a step");
            sleep(wait).await;
        }
    }
}
