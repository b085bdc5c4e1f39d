use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::command_id::{self, IdAhead};
use crate::event::{DecodeError, EncodeError, Position, StreamId, Version};
use crate::store::{CommandEvents, ExpectedVersion, StoreError};
use crate::transient::Transient;

/// The receipt of a durable command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt<R = ()> {
    /// Id of the command.
    pub command_id: Uuid,
    /// Stream of the aggregate.
    pub stream: StreamId,
    /// Version of the aggregate after the command.
    pub version: Version,
    /// Position of the command's last event. A projection at this position has applied the command.
    ///
    /// If the command caused no events, this is the position of the last event that the aggregate
    /// had folded.
    pub position: Position,
    /// Number of events of the command: versions `version - events + 1` to `version` of the stream.
    pub events: u64,
    /// Reply of the aggregate.
    pub reply: R,
    /// Whether the command was durable before this call. The receipt is then its first receipt.
    pub duplicate: bool,
}

impl<R> Receipt<R> {
    /// Creates the receipt of a command that was durable before.
    pub(crate) fn repeated(command_id: Uuid, stream: &StreamId, events: CommandEvents, reply: R) -> Self {
        Self {
            command_id,
            stream: stream.clone(),
            version: events.last,
            position: events.position,
            events: events.last.get() + 1 - events.first.get(),
            reply,
            duplicate: true,
        }
    }
}

impl Receipt {
    pub(crate) fn with_reply<R>(self, reply: R) -> Receipt<R> {
        let Self { command_id, stream, version, position, events, reply: (), duplicate } = self;
        Receipt { command_id, stream, version, position, events, reply, duplicate }
    }
}

/// An error of a command without a receipt.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ExecuteError<E> {
    /// The aggregate rejected the command; nothing happened.
    Rejected(E),
    /// The aggregate was not at the expected version; nothing happened.
    ExpectedVersion {
        /// Stream of the aggregate.
        stream: StreamId,
        /// Version that the caller expected.
        expected: ExpectedVersion,
        /// Version of the aggregate.
        actual: Version,
    },
    /// Other writers changed the stream before each attempt of this command; nothing happened.
    RetriesExhausted {
        /// Stream of the aggregate.
        stream: StreamId,
        /// Number of decisions on the command.
        attempts: u32,
    },
    /// A limit is reached; nothing happened.
    Overloaded {
        /// Limited items.
        what: Cow<'static, str>,
        /// Limit.
        limit: usize,
    },
    /// User code panicked. If it panicked in a decision, nothing happened.
    Panicked {
        /// Stream of the aggregate.
        stream: StreamId,
        /// Message of the panic.
        message: String,
    },
    /// A stored event does not decode, so the aggregate cannot be folded; nothing happened.
    Decode(DecodeError),
    /// An event or reply of the aggregate cannot be stored; nothing happened.
    Encode(EncodeError),
    /// The id is invalid in a stream name; nothing happened.
    InvalidId {
        /// Cause.
        reason: String,
    },
    /// The store failed; nothing happened.
    Store(StoreError),
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
    /// The command took effect on another node, but its reply exceeds a NATS message.
    ///
    /// A retry gives the same answer. Read the result from a read model, make replies smaller, or
    /// raise the server's `max_payload`.
    ReplyTooLarge {
        /// Id of the command.
        command_id: Uuid,
        /// Receipt without the reply, for a command of an aggregate.
        receipt: Option<Box<Receipt>>,
        /// Size of the reply in bytes.
        size: usize,
        /// Maximum message size, in bytes, of the NATS server of the executing node.
        limit: usize,
    },
    /// The command was handled, but its reply does not decode as this reply type.
    ///
    /// A retry gives the same answer. Let the type read the form that it writes, and the form that
    /// earlier versions of the program have stored.
    ReplyUnreadable {
        /// Id of the command.
        command_id: Uuid,
        /// Receipt without the reply, for a command of an aggregate.
        receipt: Option<Box<Receipt>>,
        /// Error of the decoder or encoder.
        reason: String,
    },
    /// The command exceeds a NATS message, and this node cannot execute it; nothing happened.
    ///
    /// The command was not sent.
    CommandTooLarge {
        /// Size of the command with its metadata, in bytes.
        size: usize,
        /// Maximum message size of this node's NATS server, in bytes.
        limit: usize,
    },
    /// No reachable node handles such commands; nothing happened.
    ///
    /// Shortly after an outage of NATS, nodes that handle them may not be back yet.
    NoHandler {
        /// Category of the aggregate, or name of the handler.
        name: &'static str,
        /// Whether a node that handles the command may still join.
        ///
        /// It is true if the bus reaches other nodes, which join and leave, and false otherwise.
        retryable: bool,
    },
    /// No node is available that can execute the command; nothing happened.
    ///
    /// The command bus is not connected, or the reachable nodes are shutting down, and this node
    /// cannot execute the command. The bus keeps nothing for later.
    Unavailable {
        /// Cause.
        reason: String,
    },
    /// A node that handles the command did not accept it; nothing happened.
    ///
    /// A filter or a hook refused it, or no permit or no time was left.
    NotAccepted {
        /// The refusing component and its cause.
        reason: String,
    },
    /// The command should wait for a projection that this node does not run; nothing happened.
    UnknownProjection {
        /// Requested name.
        name: String,
        /// Names of the projections on this node.
        known: Vec<String>,
    },
    /// Another command has this id; nothing happened because of this command.
    ///
    /// An id belongs to one command with one content.
    CommandIdReused {
        /// Id of both commands.
        command_id: Uuid,
    },
    /// The time in the command's id is too far in the future; nothing happened.
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
    /// The node that owns the aggregate or handler could not execute the command; nothing happened.
    Failed {
        /// Error that the node reported.
        reason: String,
    },
    /// This runtime is shutting down and accepts no commands; nothing happened.
    ///
    /// Another node may accept the command.
    ShuttingDown,
    /// The tokio runtime of this node has ended, and with it the node; nothing happened.
    ExecutorEnded,
}

impl<E: fmt::Display> fmt::Display for ExecuteError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rejected(error) => error.fmt(f),
            Self::ExpectedVersion { stream, expected, actual } => {
                write!(f, "wrong version of {stream}: expected {expected}, found version {actual}")
            }
            Self::RetriesExhausted { stream, attempts } => {
                write!(f, "too many conflicts on {stream}: gave up after {attempts} attempts; retry later")
            }
            Self::Overloaded { what, limit } => {
                write!(f, "overloaded: too many {what} (limit {limit}); retry later")
            }
            Self::Panicked { stream, message } => write!(f, "aggregate {stream} panicked: {message}"),
            Self::Decode(error) => error.fmt(f),
            Self::Encode(error) => error.fmt(f),
            Self::InvalidId { reason } => f.write_str(reason),
            Self::Store(error) => error.fmt(f),
            Self::OutcomeUnknown { command_id, reason } => {
                write!(f, "outcome of command {command_id} unknown: {reason}; retry with the same command id")
            }
            Self::ReplyTooLarge { command_id, size, limit, .. } => write!(
                f,
                "reply too large: command {command_id} took effect, but its reply of {size} bytes exceeds a NATS \
                message (limit {limit} bytes); read the result from a read model"
            ),
            Self::ReplyUnreadable { command_id, reason, .. } => write!(
                f,
                "unreadable reply: command {command_id} was handled, but its reply does not decode: {reason}; \
                let the reply type read the form that was written"
            ),
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
            Self::Decode(error) => error.source(),
            Self::Encode(error) => error.source(),
            Self::Store(StoreError::Storage { .. }) | Self::ShuttingDown | Self::ExecutorEnded => {
                Some(&Transient)
            }
            error if error.is_transient() => Some(&Transient),
            Self::Store(error) => error.source(),
            _ => None,
        }
    }
}

impl<E> From<DecodeError> for ExecuteError<E> {
    fn from(error: DecodeError) -> Self {
        Self::Decode(error)
    }
}

impl<E> From<EncodeError> for ExecuteError<E> {
    fn from(error: EncodeError) -> Self {
        Self::Encode(error)
    }
}

impl<E> ExecuteError<E> {
    /// Returns the aggregate's own error if the aggregate rejected the command.
    pub fn rejection(&self) -> Option<&E> {
        match self {
            ExecuteError::Rejected(error) => Some(error),
            _ => None,
        }
    }

    /// Returns whether this runtime may succeed with the same command later, without intervention.
    ///
    /// A retry is safe only with the same command id.
    ///
    /// [`NoHandler`](Self::NoHandler) is transient if commands go to other nodes: a node that
    /// handles them may start or come back. A handler that no program registers looks the same from
    /// this node. Callers should therefore limit or report retries.
    /// [`ShuttingDown`](Self::ShuttingDown) is not transient: this runtime accepts no further
    /// commands. If another node is shutting down, the error is [`Unavailable`](Self::Unavailable).
    pub fn is_transient(&self) -> bool {
        match self {
            ExecuteError::NoHandler { retryable, .. } => *retryable,
            ExecuteError::RetriesExhausted { .. }
            | ExecuteError::Overloaded { .. }
            | ExecuteError::Unavailable { .. }
            | ExecuteError::OutcomeUnknown { .. } => true,
            ExecuteError::Store(error) => error.is_transient(),
            _ => false,
        }
    }

    /// Returns the kind of the error as a word for metrics and spans.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            ExecuteError::Rejected(_) => "rejected",
            ExecuteError::ExpectedVersion { .. } => "expected_version",
            ExecuteError::RetriesExhausted { .. } => "retries_exhausted",
            ExecuteError::Overloaded { .. } => "overloaded",
            ExecuteError::Panicked { .. } => "panicked",
            ExecuteError::Decode(_) => "decode",
            ExecuteError::Encode(_) => "encode",
            ExecuteError::InvalidId { .. } => "invalid_id",
            ExecuteError::Store(error) => error.kind(),
            ExecuteError::OutcomeUnknown { .. } => "outcome_unknown",
            ExecuteError::ReplyTooLarge { .. } => "reply_too_large",
            ExecuteError::ReplyUnreadable { .. } => "reply_unreadable",
            ExecuteError::CommandTooLarge { .. } => "command_too_large",
            ExecuteError::NoHandler { .. } => "no_handler",
            ExecuteError::Unavailable { .. } => "unavailable",
            ExecuteError::NotAccepted { .. } => "not_accepted",
            ExecuteError::UnknownProjection { .. } => "unknown_projection",
            ExecuteError::CommandIdReused { .. } => "command_id_reused",
            ExecuteError::IdAhead { .. } => "id_ahead",
            ExecuteError::Failed { .. } => "failed",
            ExecuteError::ShuttingDown => "shutting_down",
            ExecuteError::ExecutorEnded => "executor_ended",
        }
    }

    pub(crate) fn timed_out(command_id: Uuid, waited: Duration) -> Self {
        let millis = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        let waited = Duration::from_millis(millis);
        Self::OutcomeUnknown { command_id, reason: format!("no answer within {waited:?}") }
    }

    /// Rejects a command with an id that is too far in the future.
    pub(crate) fn check_id(command_id: Uuid) -> Result<(), Self> {
        command_id::check(command_id).map_err(|IdAhead { claimed, now }| Self::IdAhead {
            command_id,
            claimed,
            now,
        })
    }

    pub(crate) fn from_store(error: StoreError, command_id: Uuid) -> Self {
        match error {
            StoreError::OutcomeUnknown { reason, .. } => Self::OutcomeUnknown { command_id, reason },
            error => Self::Store(error),
        }
    }
}

/// Lists the projections of this node, for an error about an unknown projection.
pub(crate) fn node_runs(projections: &[String]) -> String {
    match projections {
        [] => "this node runs no projection, register it with Runtime::builder()".into(),
        names => format!("this node runs {}", names.join(", ")),
    }
}

/// An error while folding a stream. All commands that wait for the stream share it.
#[derive(Debug, Clone)]
pub(crate) enum FoldError {
    Store(StoreError),
    Decode(Arc<DecodeError>),
    Panicked(String),
}

impl FoldError {
    pub(crate) fn into_execute<E>(self, stream: &StreamId) -> ExecuteError<E> {
        match self {
            FoldError::Store(error) => ExecuteError::Store(error),
            FoldError::Decode(error) => ExecuteError::Decode((*error).clone()),
            FoldError::Panicked(message) => ExecuteError::Panicked { stream: stream.clone(), message },
        }
    }
}

impl From<StoreError> for FoldError {
    fn from(error: StoreError) -> Self {
        FoldError::Store(error)
    }
}

impl From<DecodeError> for FoldError {
    fn from(error: DecodeError) -> Self {
        FoldError::Decode(Arc::new(error))
    }
}
