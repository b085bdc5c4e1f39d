//! Errors of a command: what happened, and what the caller can do.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::receipt::Receipt;
use crate::command_id::{self, IdAhead};
use crate::event::{DecodeError, EncodeError, StreamId, Version};
use crate::store::{ExpectedVersion, StoreError};
use crate::transient::Transient;

/// The error type of an aggregate or handler that rejects no command. It has no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum NeverRejects {}

/// An error of a command without a receipt. The variant says what the caller can do.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ExecuteError<E> {
    /// The aggregate, decision or handler rejected the command.
    ///
    /// A rejection by an aggregate or a decision changes nothing. A retry is decided on the state
    /// of that time. A rejection by a handler is recorded: the same id is rejected again. Commands
    /// that the handler had executed before may have taken effect.
    Rejected(E),
    /// This attempt had no effect.
    ///
    /// After an earlier [`OutcomeUnknown`](Self::OutcomeUnknown) keep the id: the first attempt may
    /// have taken effect, and this one failed before it found that out.
    NotExecuted {
        /// Cause.
        kind: NotExecutedKind,
        /// Whether this runtime may succeed with the same command later, without intervention.
        ///
        /// Limit or report retries: [`NoHandler`](NotExecutedKind::NoHandler) looks the same whether
        /// a node is away or no program registers the handler.
        retryable: bool,
    },
    /// No answer arrived in time, or the store could not determine whether its commit happened.
    ///
    /// The command may be durable, or may still become durable. Retry it with the same id: if it is
    /// durable, the answer is its first receipt.
    OutcomeUnknown {
        /// Id of the command.
        command_id: Uuid,
        /// Cause.
        reason: String,
    },
    /// The command took effect, but its reply cannot be returned. A retry gives the same answer.
    NoReply {
        /// Id of the command.
        command_id: Uuid,
        /// Receipt without the reply, for a command of an aggregate.
        receipt: Option<Box<Receipt>>,
        /// Cause.
        kind: NoReplyKind,
    },
}

/// The reason why an attempt at a command had no effect.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum NotExecutedKind {
    /// The aggregate was not at the expected version.
    ExpectedVersion {
        /// Stream of the aggregate.
        stream: StreamId,
        /// Version that the caller expected.
        expected: ExpectedVersion,
        /// Version of the aggregate.
        actual: Version,
    },
    /// Other writers appended first, at each attempt of this command. Retryable.
    ///
    /// They changed the stream of the aggregate, or appended events that match the queries of the
    /// decision.
    RetriesExhausted {
        /// Stream of the aggregate, or of the decision's events.
        stream: StreamId,
        /// Number of decisions on the command.
        attempts: u32,
    },
    /// A limit is reached. Retryable.
    Overloaded {
        /// Limited items.
        what: Cow<'static, str>,
        /// Limit.
        limit: usize,
    },
    /// User code panicked before anything was stored.
    Panicked {
        /// Stream of the aggregate, or of the decision's events.
        stream: StreamId,
        /// Message of the panic.
        message: String,
    },
    /// A stored event does not decode, so the aggregate or the view cannot be folded.
    Decode(DecodeError),
    /// An event or a reply cannot be stored.
    Encode(EncodeError),
    /// The id is invalid in a stream name, or the name of the decision is invalid.
    InvalidId {
        /// Cause.
        reason: String,
    },
    /// The store failed. Retryable if the store's error [is transient](StoreError::is_transient).
    Store(StoreError),
    /// The command exceeds a NATS message, and this node cannot execute it. It was not sent.
    CommandTooLarge {
        /// Size of the command with its metadata, in bytes.
        size: usize,
        /// Maximum message size of this node's NATS server, in bytes.
        limit: usize,
    },
    /// No reachable node handles such commands.
    ///
    /// Shortly after an outage of NATS, nodes that handle them may not be back yet. Retryable if
    /// the bus reaches other nodes, which join and leave.
    NoHandler {
        /// Category of the aggregate, or name of the handler.
        name: &'static str,
        /// Whether the bus reaches other nodes.
        retryable: bool,
    },
    /// No node is available that can execute the command. Retryable.
    ///
    /// The command bus is not connected, or the reachable nodes are shutting down or restart the
    /// actor, and this node cannot execute the command. The bus keeps nothing for later.
    Unavailable {
        /// Cause.
        reason: String,
    },
    /// The actor of the aggregate or handler on this node is restarting. Retryable.
    Restarting {
        /// Category of the aggregate, or name of the handler.
        name: &'static str,
    },
    /// A node that handles the command did not accept it.
    ///
    /// A filter or a hook refused it, or no permit or no time was left.
    NotAccepted {
        /// The refusing component and its cause.
        reason: String,
    },
    /// The command should wait for a projection that this node does not run.
    UnknownProjection {
        /// Requested name.
        name: String,
        /// Names of the projections on this node.
        known: Vec<String>,
    },
    /// Another command has this id. An id belongs to one command with one content.
    CommandIdReused {
        /// Id of both commands.
        command_id: Uuid,
    },
    /// The time in the command's id is too far in the future.
    ///
    /// The id is a UUIDv7 that is more than 1 minute ahead of the clock of the executing node.
    IdAhead {
        /// Id of the command.
        command_id: Uuid,
        /// Time in the id.
        claimed: DateTime<Utc>,
        /// Time on the node.
        now: DateTime<Utc>,
    },
    /// The node that owns the aggregate or handler could not execute the command.
    Failed {
        /// Error that the node reported.
        reason: String,
    },
    /// This runtime is shutting down and accepts no commands. Another node may accept the command.
    ShuttingDown,
    /// The tokio runtime of this node has ended, and with it the node.
    ExecutorEnded,
}

/// The reason why the reply of a command that took effect cannot be returned.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum NoReplyKind {
    /// The command was executed on another node, and its reply exceeds a NATS message.
    ///
    /// Read the result from a read model, make replies smaller, or raise the server's `max_payload`.
    TooLarge {
        /// Size of the reply in bytes.
        size: usize,
        /// Maximum message size, in bytes, of the NATS server of the executing node.
        limit: usize,
    },
    /// The reply does not decode as this reply type.
    ///
    /// Let the type read the form that it writes, and the form that earlier versions of the program
    /// have stored.
    Unreadable {
        /// Error of the decoder or encoder.
        reason: String,
    },
}

impl<E: fmt::Display> fmt::Display for ExecuteError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rejected(error) => error.fmt(f),
            Self::NotExecuted { kind, .. } => kind.fmt(f),
            Self::OutcomeUnknown { command_id, reason } => {
                write!(f, "outcome of command {command_id} unknown: {reason}; retry with the same command id")
            }
            Self::NoReply { command_id, kind: NoReplyKind::TooLarge { size, limit }, .. } => write!(
                f,
                "reply too large: command {command_id} took effect, but its reply of {size} bytes exceeds a NATS \
                message (limit {limit} bytes); read the result from a read model"
            ),
            Self::NoReply { command_id, kind: NoReplyKind::Unreadable { reason }, .. } => write!(
                f,
                "unreadable reply: command {command_id} was handled, but its reply does not decode: {reason}; \
                let the reply type read the form that was written"
            ),
        }
    }
}

impl fmt::Display for NotExecutedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExpectedVersion { stream, expected, actual } => {
                write!(f, "wrong version of {stream}: expected {expected}, found version {actual}")
            }
            Self::RetriesExhausted { stream, attempts } => {
                write!(f, "too many conflicts on {stream}: gave up after {attempts} attempts; retry later")
            }
            Self::Overloaded { what, limit } => {
                write!(f, "overloaded: too many {what} (limit {limit}); retry later")
            }
            Self::Panicked { stream, message } => {
                write!(f, "the code that decides on {stream} panicked: {message}")
            }
            Self::Decode(error) => error.fmt(f),
            Self::Encode(error) => error.fmt(f),
            Self::InvalidId { reason } => f.write_str(reason),
            Self::Store(error) => error.fmt(f),
            Self::CommandTooLarge { size, limit } => write!(
                f,
                "command too large: {size} bytes exceed a NATS message (limit {limit} bytes); reduce the command, \
                or raise the server's max_payload"
            ),
            Self::NoHandler { name, .. } => write!(
                f,
                "no node handles commands for {name:?}; register the aggregate or handler with Runtime::builder() \
                on a running node"
            ),
            Self::Unavailable { reason } => write!(f, "command bus unavailable: {reason}"),
            Self::Restarting { name } => write!(f, "the actor of {name:?} is restarting; retry later"),
            Self::NotAccepted { reason } => write!(f, "command not accepted: {reason}"),
            Self::UnknownProjection { name, known } => {
                write!(f, "there is no projection {name:?}; {}", node_runs(known))
            }
            Self::IdAhead { command_id, claimed, now } => write!(
                f,
                "invalid command id {command_id}: its time {claimed} is more than 1 minute ahead of the executing \
                node's clock {now}; generate a new id, or correct the wrong clock"
            ),
            Self::CommandIdReused { command_id } => write!(
                f,
                "command id reused: {command_id} belongs to a command with another content; use a unique id for \
                every command"
            ),
            Self::Failed { reason } => write!(f, "command failed on its node: {reason}"),
            Self::ExecutorEnded => f.write_str(
                "node has ended: the tokio runtime in which it was started has ended; start a new node with \
            Runtime::builder() in a tokio runtime that outlives it",
            ),
            Self::ShuttingDown => f.write_str("command not accepted: this runtime is shutting down"),
        }
    }
}

/// A transient error has `Transient` among its causes.
///
/// Callers cannot always downcast to this type: it depends on the aggregate, and a transparent
/// error forwards only the causes.
impl<E: Error + 'static> Error for ExecuteError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Rejected(error) => error.source(),
            Self::NotExecuted { kind, retryable } => match kind {
                NotExecutedKind::Decode(error) => error.source(),
                NotExecutedKind::Encode(error) => error.source(),
                NotExecutedKind::Store(StoreError::Storage { .. })
                | NotExecutedKind::ShuttingDown
                | NotExecutedKind::ExecutorEnded => Some(&Transient),
                _ if *retryable => Some(&Transient),
                NotExecutedKind::Store(error) => error.source(),
                _ => None,
            },
            Self::OutcomeUnknown { .. } => Some(&Transient),
            Self::NoReply { .. } => None,
        }
    }
}

impl<E> From<NotExecutedKind> for ExecuteError<E> {
    fn from(kind: NotExecutedKind) -> Self {
        let retryable = kind.is_retryable();
        Self::NotExecuted { kind, retryable }
    }
}

impl<E> From<DecodeError> for ExecuteError<E> {
    fn from(error: DecodeError) -> Self {
        NotExecutedKind::Decode(error).into()
    }
}

impl<E> From<EncodeError> for ExecuteError<E> {
    fn from(error: EncodeError) -> Self {
        NotExecutedKind::Encode(error).into()
    }
}

impl<E> ExecuteError<E> {
    /// Returns the error of the aggregate, decision or handler if it rejected the command.
    pub fn rejection(&self) -> Option<&E> {
        match self {
            Self::Rejected(error) => Some(error),
            _ => None,
        }
    }

    /// Returns whether this runtime may succeed with the same command later, without intervention.
    ///
    /// A retry is safe only with the same command id.
    ///
    /// [`ShuttingDown`](NotExecutedKind::ShuttingDown) is not transient: this runtime accepts no
    /// further commands. If another node is shutting down, the error is
    /// [`Unavailable`](NotExecutedKind::Unavailable).
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Rejected(_) | Self::NoReply { .. } => false,
            Self::NotExecuted { retryable, .. } => *retryable,
            Self::OutcomeUnknown { .. } => true,
        }
    }

    /// Returns the kind of the error as one word in snake case, as metrics and spans have it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Rejected(_) => "rejected",
            Self::NotExecuted { kind, .. } => kind.name(),
            Self::OutcomeUnknown { .. } => "outcome_unknown",
            Self::NoReply { kind: NoReplyKind::TooLarge { .. }, .. } => "reply_too_large",
            Self::NoReply { kind: NoReplyKind::Unreadable { .. }, .. } => "reply_unreadable",
        }
    }

    pub(crate) fn timed_out(command_id: Uuid, waited: Duration) -> Self {
        let millis = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        let waited = Duration::from_millis(millis);
        Self::OutcomeUnknown { command_id, reason: format!("no answer within {waited:?}") }
    }

    pub(crate) fn unreadable_reply(command_id: Uuid, receipt: Option<Receipt>, reason: String) -> Self {
        let receipt = receipt.map(Box::new);
        Self::NoReply { command_id, receipt, kind: NoReplyKind::Unreadable { reason } }
    }

    pub(crate) fn from_store(error: StoreError, command_id: Uuid) -> Self {
        match error {
            StoreError::OutcomeUnknown { reason, .. } => Self::OutcomeUnknown { command_id, reason },
            error => NotExecutedKind::Store(error).into(),
        }
    }
}

impl NotExecutedKind {
    fn is_retryable(&self) -> bool {
        match self {
            Self::NoHandler { retryable, .. } => *retryable,
            Self::RetriesExhausted { .. }
            | Self::Overloaded { .. }
            | Self::Unavailable { .. }
            | Self::Restarting { .. } => true,
            Self::Store(error) => error.is_transient(),
            _ => false,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::ExpectedVersion { .. } => "expected_version",
            Self::RetriesExhausted { .. } => "retries_exhausted",
            Self::Overloaded { .. } => "overloaded",
            Self::Panicked { .. } => "panicked",
            Self::Decode(_) => "decode",
            Self::Encode(_) => "encode",
            Self::InvalidId { .. } => "invalid_id",
            Self::Store(error) => error.kind(),
            Self::CommandTooLarge { .. } => "command_too_large",
            Self::NoHandler { .. } => "no_handler",
            Self::Unavailable { .. } => "unavailable",
            Self::Restarting { .. } => "restarting",
            Self::NotAccepted { .. } => "not_accepted",
            Self::UnknownProjection { .. } => "unknown_projection",
            Self::CommandIdReused { .. } => "command_id_reused",
            Self::IdAhead { .. } => "id_ahead",
            Self::Failed { .. } => "failed",
            Self::ShuttingDown => "shutting_down",
            Self::ExecutorEnded => "executor_ended",
        }
    }

    /// Refuses an id that is too far in the future.
    pub(crate) fn check_id(command_id: Uuid) -> Result<(), Self> {
        command_id::check(command_id).map_err(|IdAhead { claimed, now }| Self::IdAhead {
            command_id,
            claimed,
            now,
        })
    }
}

/// Lists the projections of this node, for an error about an unknown projection.
pub(crate) fn node_runs(projections: &[String]) -> String {
    match projections {
        [] => "this node runs no projection, register it with Runtime::builder()".into(),
        names => format!("this node runs {}", names.join(", ")),
    }
}
