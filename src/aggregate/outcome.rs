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

/// The answer to a command that took effect: what it says is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt<R = ()> {
    /// The command.
    pub command_id: Uuid,
    /// The aggregate's stream.
    pub stream: StreamId,
    /// The version of the aggregate after the command.
    pub version: Version,
    /// The position of the command's last event: a projection that has caught up to it knows of the command. When the
    /// command caused no events, of the last event before it that the aggregate knows.
    pub position: Position,
    /// How many events the command caused: versions `version - events + 1` to `version` of the stream.
    pub events: u64,
    /// The aggregate's reply.
    pub reply: R,
    /// The command had taken effect before; this is its first receipt.
    pub duplicate: bool,
}

impl<R> Receipt<R> {
    /// The receipt of a command that took effect before.
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

/// Why a command got no receipt.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ExecuteError<E> {
    /// The aggregate refused; nothing happened.
    Rejected(E),
    /// The aggregate was not at the version that the caller asked for; nothing happened.
    ExpectedVersion {
        /// Which aggregate.
        stream: StreamId,
        /// What the caller expected.
        expected: ExpectedVersion,
        /// Where it is.
        actual: Version,
    },
    /// Others wrote to the aggregate's stream each time before this command could; nothing happened.
    Contended {
        /// Which aggregate.
        stream: StreamId,
        /// How often the command was decided.
        attempts: u32,
    },
    /// A limit is reached; nothing happened.
    Overloaded {
        /// Of what there are too many.
        what: Cow<'static, str>,
        /// The limit.
        limit: usize,
    },
    /// The user's code panicked. If it did so while deciding, nothing happened.
    Panicked {
        /// Which aggregate.
        stream: StreamId,
        /// The panic's message.
        message: String,
    },
    /// The aggregate cannot be folded: a stored event does not decode. Nothing happened.
    Unreadable(DecodeError),
    /// An event or reply that the aggregate produced cannot be stored; nothing happened.
    Unwritable(EncodeError),
    /// The id cannot name a stream; nothing happened.
    InvalidId {
        /// What is wrong with it.
        reason: String,
    },
    /// The store failed; nothing happened.
    Store(StoreError),
    /// There was no answer in time, or the store could not say whether its commit happened. The command may have taken
    /// effect, or may still: dispatch it again with the same id, and it is answered with the first receipt if it had.
    OutcomeUnknown {
        /// The command.
        command_id: Uuid,
        /// What happened.
        reason: String,
    },
    /// The command took effect on another node, and its reply does not fit into a NATS message. Repeating it gives the same
    /// answer: read the result from a read model, make replies smaller, or raise the server's `max_payload`.
    ReplyTooLarge {
        /// The command.
        command_id: Uuid,
        /// Of an aggregate's command: its receipt without the reply.
        receipt: Option<Box<Receipt>>,
        /// Bytes of the reply.
        size: usize,
        /// Bytes of a message on the NATS server of the node that executed the command.
        limit: usize,
    },
    /// The command was handled, but no program with this type of reply can read the reply. Repeating the command gives the same
    /// answer: change the type so that serde reads what it writes.
    ReplyUnreadable {
        /// The command.
        command_id: Uuid,
        /// Of an aggregate's command: its receipt without the reply.
        receipt: Option<Box<Receipt>>,
        /// What the decoder or encoder reports.
        reason: String,
    },
    /// The command does not fit into a NATS message, and this node cannot execute it itself; it was not sent, and nothing
    /// happened.
    CommandTooLarge {
        /// Bytes of the command with its metadata.
        size: usize,
        /// Bytes of a message on this node's NATS server.
        limit: usize,
    },
    /// No node that can be reached handles such commands; nothing happened. Right behind an outage of NATS it may also be that
    /// those that do are not back yet.
    NoHandler {
        /// The aggregate's category, or the handler's name.
        name: &'static str,
        /// Whether somebody who does may still come: commands go to other nodes, and these come and go. Without such a bus
        /// nobody will.
        may_come: bool,
    },
    /// The command bus is not connected, or the nodes that it reaches were shutting down, and this node cannot execute the
    /// command itself; nothing happened, and nothing is kept to happen later.
    Unavailable {
        /// What is missing.
        reason: String,
    },
    /// Whoever could have executed the command would not (a filter, a hook, no place, no time left); nothing happened.
    Refused {
        /// Who refused, and why.
        reason: String,
    },
    /// The command was to wait for a projection that this node does not run; nothing happened.
    UnknownProjection {
        /// The name asked for.
        name: String,
        /// The names of the projections of this node.
        known: Vec<String>,
    },
    /// Another command has this id; nothing happened because of this one. An id belongs to one command with one content.
    SameId {
        /// The id.
        command_id: Uuid,
    },
    /// The time in the command's id, a UUIDv7, is more than a minute ahead of the clock of the node that was to execute it;
    /// nothing happened.
    IdAhead {
        /// The id.
        command_id: Uuid,
        /// The time in the id.
        claimed: DateTime<Utc>,
        /// The time on the node.
        now: DateTime<Utc>,
    },
    /// The node that owns the aggregate or handler could not execute the command; nothing happened.
    Failed {
        /// What that node said.
        reason: String,
    },
    /// This runtime is shutting down and takes no commands; nothing happened. Another one may.
    ShuttingDown,
    /// The tokio runtime in which this node was started has ended, and the node with it; nothing happened.
    ExecutorEnded,
}

impl<E: fmt::Display> fmt::Display for ExecuteError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rejected(error) => error.fmt(f),
            Self::ExpectedVersion { stream, expected, actual } => {
                write!(f, "{stream} was expected at {expected}, and is at version {actual}")
            }
            Self::Contended { stream, attempts } => write!(
                f,
                "gave up after {attempts} attempts, because others kept writing to {stream}; try again later"
            ),
            Self::Overloaded { what, limit } => {
                write!(f, "overloaded: {limit} {what} are the limit; try again later")
            }
            Self::Panicked { stream, message } => write!(f, "the aggregate {stream} panicked: {message}"),
            Self::Unreadable(error) => error.fmt(f),
            Self::Unwritable(error) => error.fmt(f),
            Self::InvalidId { reason } => f.write_str(reason),
            Self::Store(error) => error.fmt(f),
            Self::OutcomeUnknown { command_id, reason } => write!(
                f,
                "it is unknown whether command {command_id} took effect: {reason}; dispatch it again with the same id to find out"
            ),
            Self::ReplyTooLarge { command_id, size, limit, .. } => write!(
                f,
                "command {command_id} took effect, but its reply of {size} bytes does not fit into a NATS message (limit {limit} \
                 bytes); read the result from a read model"
            ),
            Self::ReplyUnreadable { command_id, reason, .. } => write!(
                f,
                "command {command_id} was handled, but its reply cannot be read: {reason}; change the type of the reply so that serde reads what it writes"
            ),
            Self::CommandTooLarge { size, limit } => write!(
                f,
                "the command has {size} bytes and does not fit into a NATS message (limit {limit} bytes); make it smaller, or raise \
                 the server's max_payload"
            ),
            Self::NoHandler { name, .. } => write!(
                f,
                "no node handles commands for {name:?}; register the aggregate or handler with Runtime::builder() on a node that runs"
            ),
            Self::Unavailable { reason } => write!(f, "the command bus is unavailable: {reason}"),
            Self::Refused { reason } => write!(f, "the command was refused: {reason}"),
            Self::UnknownProjection { name, known } => {
                write!(f, "there is no projection {name:?}; {}", node_runs(known))
            }
            Self::IdAhead { command_id, claimed, now } => write!(
                f,
                "invalid command id {command_id}: its time, {claimed}, is more than 1 minute ahead of the clock of the node that executes it, {now}; make a new id, or correct the clock that is wrong"
            ),
            Self::SameId { command_id } => write!(
                f,
                "command id {command_id} belongs to a command with another content; give every command an id of its own"
            ),
            Self::Failed { reason } => write!(f, "the command failed on its node: {reason}"),
            Self::ExecutorEnded => f.write_str(
                "the tokio runtime in which this node was started has ended; start a new node with Runtime::builder() in a tokio runtime that lives as long",
            ),
            Self::ShuttingDown => f.write_str("the runtime is shutting down and takes no more commands"),
        }
    }
}

/// The cause of a transient error says that it is one: the type of this error depends on the aggregate, and is hidden by an error that
/// hands on only the causes.
impl<E: Error + 'static> Error for ExecuteError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Rejected(error) => error.source(),
            Self::Unreadable(error) => error.source(),
            Self::Unwritable(error) => error.source(),
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
        Self::Unreadable(error)
    }
}

impl<E> From<EncodeError> for ExecuteError<E> {
    fn from(error: EncodeError) -> Self {
        Self::Unwritable(error)
    }
}

impl<E> ExecuteError<E> {
    /// The aggregate's own error, if that is what it is.
    pub fn rejection(&self) -> Option<&E> {
        match self {
            ExecuteError::Rejected(error) => Some(error),
            _ => None,
        }
    }

    /// Whether this runtime may carry out the same command later without anybody doing anything to it. Safe to repeat only
    /// with the same command id.
    ///
    /// [`NoHandler`](Self::NoHandler) is transient where commands go to other nodes: one that handles them may start, or come
    /// back. That nobody ever will, because no program registers it, looks the same from here: whoever repeats a command
    /// should stop at some time, or say so. [`ShuttingDown`](Self::ShuttingDown) is not: this runtime takes no command any
    /// more. When another node was, the error is [`Unavailable`](Self::Unavailable).
    pub fn is_transient(&self) -> bool {
        match self {
            ExecuteError::NoHandler { may_come, .. } => *may_come,
            ExecuteError::Contended { .. }
            | ExecuteError::Overloaded { .. }
            | ExecuteError::Unavailable { .. }
            | ExecuteError::OutcomeUnknown { .. } => true,
            ExecuteError::Store(error) => error.is_transient(),
            _ => false,
        }
    }

    /// What kind of error it is, in one word.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            ExecuteError::Rejected(_) => "rejected",
            ExecuteError::ExpectedVersion { .. } => "expected_version",
            ExecuteError::Contended { .. } => "contended",
            ExecuteError::Overloaded { .. } => "overloaded",
            ExecuteError::Panicked { .. } => "panicked",
            ExecuteError::Unreadable(_) => "unreadable",
            ExecuteError::Unwritable(_) => "unwritable",
            ExecuteError::InvalidId { .. } => "invalid_id",
            ExecuteError::Store(error) => error.kind(),
            ExecuteError::OutcomeUnknown { .. } => "outcome_unknown",
            ExecuteError::ReplyTooLarge { .. } => "reply_too_large",
            ExecuteError::ReplyUnreadable { .. } => "reply_unreadable",
            ExecuteError::CommandTooLarge { .. } => "command_too_large",
            ExecuteError::NoHandler { .. } => "no_handler",
            ExecuteError::Unavailable { .. } => "unavailable",
            ExecuteError::Refused { .. } => "refused",
            ExecuteError::UnknownProjection { .. } => "unknown_projection",
            ExecuteError::SameId { .. } => "same_id",
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

    /// Refuses a command whose id is from the future.
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

/// The projections of this node, for an error that names another one.
pub(crate) fn node_runs(projections: &[String]) -> String {
    match projections {
        [] => "this node runs no projection, register it with Runtime::builder()".into(),
        names => format!("this node runs {}", names.join(", ")),
    }
}

/// Why a stream could not be folded. Shared by all commands that wait for it.
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
            FoldError::Decode(error) => ExecuteError::Unreadable((*error).clone()),
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
