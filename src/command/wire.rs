//! The wire format of commands and replies: CBOR maps, described in `docs/wire-format.md`.
//!
//! The record of a handler's command has the same form.

use chrono::DateTime;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::codec::{SerializeError, byte_string, from_cbor, to_cbor};
use crate::command_id;
use crate::event::{Position, StreamId, Version};
use crate::panic::text_of;
use crate::store::{ExpectedVersion, StoreError};

use super::{ExecuteError, NoReplyKind, NotExecutedKind, Receipt};

/// Version number of this format.
pub(super) const FORMAT: u32 = 1;

/// The kind of a command's target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Aggregate,
    Handler,
}

/// A command in flight to another node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct CommandFrame {
    #[serde(rename = "wire")]
    pub(crate) format: u32,
    pub(crate) id: Uuid,
    pub(crate) kind: Kind,
    /// Category of the aggregate, or name of the handler.
    pub(crate) name: String,
    /// Id of the aggregate, or key from the handler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<String>,
    #[serde(with = "byte_string")]
    pub(crate) payload: Vec<u8>,
    #[serde(with = "byte_string")]
    pub(crate) metadata: Vec<u8>,
    #[serde(default, skip_serializing_if = "Expected::is_any")]
    pub(crate) expected: Expected,
    /// Time left at the time of sending, in milliseconds. Absent: no limit.
    ///
    /// The format compares no two clocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) left: Option<u64>,
    /// Sending node and the time on its clock, as in its presence messages.
    ///
    /// The receiver derives the transit time of the command from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sent: Option<Sent>,
    /// Number of the attempt: 1, 2, 3 …
    pub(crate) attempt: u32,
    /// Whether the caller waits for the acceptance of the command, and not only for its end.
    #[serde(default)]
    pub(crate) prompt: bool,
}

/// The sending node and time of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sent {
    /// Incarnation of the node: new with every start.
    pub(crate) node: Uuid,
    /// Milliseconds since that start.
    pub(crate) clock: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Expected {
    #[default]
    Any,
    NoStream,
    StreamExists,
    Exact(u64),
}

impl Expected {
    fn is_any(&self) -> bool {
        *self == Self::Any
    }
}

impl From<ExpectedVersion> for Expected {
    fn from(expected: ExpectedVersion) -> Self {
        match expected {
            ExpectedVersion::Any => Self::Any,
            ExpectedVersion::NoStream => Self::NoStream,
            ExpectedVersion::StreamExists => Self::StreamExists,
            ExpectedVersion::Exact(version) => Self::Exact(version.get()),
        }
    }
}

impl From<Expected> for ExpectedVersion {
    fn from(expected: Expected) -> Self {
        match expected {
            Expected::Any => Self::Any,
            Expected::NoStream => Self::NoStream,
            Expected::StreamExists => Self::StreamExists,
            Expected::Exact(version) => Self::Exact(Version::new(version)),
        }
    }
}

/// A reply of a node to a command that it received.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Reply {
    #[serde(rename = "wire")]
    pub(crate) format: u32,
    /// Incarnation of the replying node: new with every start.
    pub(crate) incarnation: Uuid,
    pub(crate) says: ReplyKind,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ReplyKind {
    /// The command has its permit and will be executed.
    Accepted,
    /// The command is still in flight.
    Alive,
    /// This node does not execute the command; nothing happened.
    Refused(Failure),
    /// The command has ended with this answer.
    Executed(Answered),
}

/// Maximum length of the message of a shortened error, in characters.
const SHORTENED: usize = 1_000;

impl ReplyKind {
    /// Shortens a reply of `size` bytes to fit into a message of `limit` bytes.
    ///
    /// The result of the command stays; its content is dropped.
    pub(crate) fn shortened(self, size: usize, limit: usize) -> Self {
        match self {
            ReplyKind::Refused(failure) => ReplyKind::Refused(failure.shortened(size, limit)),
            ReplyKind::Executed(Answered { runtime, outcome }) => {
                let outcome = match outcome {
                    Outcome::Done(Done { reply, version, position, events, duplicate, .. }) => {
                        let omitted = Some(Omitted { size: reply.len() as u64, limit: limit as u64 });
                        Outcome::Done(Done {
                            reply: Vec::new(),
                            omitted,
                            version,
                            position,
                            events,
                            duplicate,
                        })
                    }
                    Outcome::Error(failure) => Outcome::Error(failure.shortened(size, limit)),
                };
                ReplyKind::Executed(Answered { runtime, outcome })
            }
            says @ (ReplyKind::Accepted | ReplyKind::Alive) => says,
        }
    }

    /// Converts the shutdown of another node to `Unavailable`: this node is not shutting down.
    pub(crate) fn of_another(&mut self) {
        if let ReplyKind::Refused(failure)
        | ReplyKind::Executed(Answered { outcome: Outcome::Error(failure), .. }) = self
            && failure.code == Code::ShuttingDown
        {
            failure.code = Code::Unavailable;
        }
    }
}

/// The outcome of a command, and its duration on the executing node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answered {
    /// Duration in microseconds.
    pub(crate) runtime: u64,
    pub(crate) outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Done(Done),
    Error(Failure),
}

/// The result of a command that took effect.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Done {
    #[serde(with = "byte_string")]
    pub(crate) reply: Vec<u8>,
    /// Whether the command had taken effect before.
    #[serde(default)]
    pub(crate) duplicate: bool,
    /// Version of the aggregate after the command; for aggregates only.
    #[serde(default)]
    pub(crate) version: u64,
    /// Position of the last event; for aggregates only.
    #[serde(default)]
    pub(crate) position: u64,
    /// Number of events; for aggregates only.
    #[serde(default)]
    pub(crate) events: u64,
    /// Set if the reply did not fit into a message and was omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) omitted: Option<Omitted>,
}

/// The sizes of an omitted reply, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Omitted {
    pub(crate) size: u64,
    /// Maximum size of a message.
    pub(crate) limit: u64,
}

/// The error of a command without a receipt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// Kind of [`ExecuteError`]; see there.
    pub(crate) code: Code,
    /// Message for people.
    pub(crate) message: String,
    /// The user's own error, for `rejected`.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "byte_string")]
    pub(crate) details: Vec<u8>,
    /// Number that belongs to the code.
    ///
    /// It is the found version, the number of attempts, the limit, or the time on the node (in
    /// milliseconds since 1970).
    #[serde(default)]
    pub(crate) number: u64,
    /// Size that exceeds the limit, in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) size: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Code {
    Rejected,
    ExpectedVersion,
    RetriesExhausted,
    Overloaded,
    Panicked,
    StoreUnavailable,
    #[default]
    OutcomeUnknown,
    NoHandler,
    Unavailable,
    Refused,
    CommandIdReused,
    IdAhead,
    ShuttingDown,
    /// The command does not fit into a message. It is never sent.
    ///
    /// `number` is the limit, and `size` the size of the command, both in bytes.
    CommandTooLarge,
    /// The command was handled, but its reply cannot be encoded or decoded.
    ReplyUnreadable,
    /// Any other error after which nothing happened.
    Failed,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), ..Self::default() }
    }

    /// Shortens the error to fit into a message.
    ///
    /// The user's error is dropped. A rejection becomes `Failed`, which still means that nothing
    /// happened.
    fn shortened(self, size: usize, limit: usize) -> Self {
        let mut message: String = self.message.chars().take(SHORTENED).collect();
        message.push_str(&format!(
            " (shortened: the answer has {size} bytes, NATS message limit {limit} bytes)"
        ));
        let code = if self.code == Code::Rejected { Code::Failed } else { self.code };
        Self { code, message, details: Vec::new(), ..self }
    }

    /// Returns whether the command may have taken effect.
    pub(crate) fn is_unknown(&self) -> bool {
        self.code == Code::OutcomeUnknown
    }

    /// Returns whether a node that had the command reports the error.
    ///
    /// Otherwise no node has accepted the command.
    pub(crate) fn is_answer(&self) -> bool {
        !matches!(
            self.code,
            Code::NoHandler
                | Code::Unavailable
                | Code::Overloaded
                | Code::ShuttingDown
                | Code::Refused
                | Code::CommandTooLarge
        )
    }

    /// Encodes an error for another node or for a record.
    pub(crate) fn of<E: std::error::Error + Serialize>(error: &ExecuteError<E>) -> Self {
        let said = text_of(error);
        match error {
            ExecuteError::Rejected(rejection) => match to_cbor(rejection) {
                Ok(details) => Self { details, ..Self::new(Code::Rejected, said) },
                Err(error) => Self::new(Code::Failed, format!("{said} (details cannot be encoded: {error})")),
            },
            ExecuteError::NotExecuted { kind, .. } => Self::of_kind(kind, said),
            ExecuteError::OutcomeUnknown { reason, .. } => Self::new(Code::OutcomeUnknown, reason),
            ExecuteError::NoReply { kind: NoReplyKind::TooLarge { .. }, .. } => {
                Self::new(Code::OutcomeUnknown, said)
            }
            ExecuteError::NoReply { kind: NoReplyKind::Unreadable { reason }, .. } => {
                Self::new(Code::ReplyUnreadable, reason)
            }
        }
    }

    fn of_kind(kind: &NotExecutedKind, said: String) -> Self {
        let with = |code, message: &str, number| Self { number, ..Self::new(code, message) };
        match kind {
            NotExecutedKind::ExpectedVersion { actual, .. } => {
                with(Code::ExpectedVersion, &said, actual.get())
            }
            NotExecutedKind::RetriesExhausted { attempts, .. } => {
                with(Code::RetriesExhausted, &said, u64::from(*attempts))
            }
            NotExecutedKind::Overloaded { what, limit } => with(Code::Overloaded, what, *limit as u64),
            NotExecutedKind::Panicked { message, .. } => Self::new(Code::Panicked, message),
            NotExecutedKind::Store(StoreError::Unavailable { reason, .. }) => {
                Self::new(Code::StoreUnavailable, reason)
            }
            NotExecutedKind::NoHandler { .. } => Self::new(Code::NoHandler, said),
            NotExecutedKind::Unavailable { reason } => Self::new(Code::Unavailable, reason),
            NotExecutedKind::Restarting { .. } => Self::new(Code::Unavailable, said),
            NotExecutedKind::NotAccepted { reason } => Self::new(Code::Refused, reason),
            NotExecutedKind::CommandIdReused { .. } => Self::new(Code::CommandIdReused, said),
            NotExecutedKind::IdAhead { now, .. } => {
                with(Code::IdAhead, &said, u64::try_from(now.timestamp_millis()).unwrap_or(0))
            }
            NotExecutedKind::ShuttingDown => Self::new(Code::ShuttingDown, said),
            NotExecutedKind::Failed { reason } => Self::new(Code::Failed, reason),
            _ => Self::new(Code::Failed, said),
        }
    }

    /// Decodes an error of another node or of a record for the caller.
    pub(crate) fn into_error<E: DeserializeOwned>(self, about: &About<'_>) -> ExecuteError<E> {
        let unknown = |reason| ExecuteError::OutcomeUnknown { command_id: about.id, reason };
        let stream = || about.stream.cloned();
        match (self.code, stream()) {
            // The rejection stands, even if its details do not decode.
            (Code::Rejected, _) => match from_cbor(&self.details) {
                Ok(rejection) => ExecuteError::Rejected(rejection),
                Err(error) => {
                    let reason = format!("{} (details do not decode: {error})", self.message);
                    ExecuteError::from(NotExecutedKind::Failed { reason })
                }
            },
            (Code::ExpectedVersion, Some(stream)) => ExecuteError::from(NotExecutedKind::ExpectedVersion {
                stream,
                expected: about.expected,
                actual: Version::new(self.number),
            }),
            (Code::RetriesExhausted, Some(stream)) => {
                let attempts = u32::try_from(self.number).unwrap_or(u32::MAX);
                ExecuteError::from(NotExecutedKind::RetriesExhausted { stream, attempts })
            }
            (Code::Overloaded, _) => {
                let limit = usize::try_from(self.number).unwrap_or(usize::MAX);
                ExecuteError::from(NotExecutedKind::Overloaded { what: self.message.into(), limit })
            }
            (Code::Panicked, Some(stream)) => {
                ExecuteError::from(NotExecutedKind::Panicked { stream, message: self.message })
            }
            (Code::StoreUnavailable, _) => {
                ExecuteError::from(NotExecutedKind::Store(StoreError::Unavailable {
                    reason: self.message,
                    source: None,
                }))
            }
            (Code::OutcomeUnknown, _) => unknown(self.message),
            (Code::ReplyUnreadable, _) => ExecuteError::unreadable_reply(about.id, None, self.message),
            (Code::NoHandler, _) => {
                ExecuteError::from(NotExecutedKind::NoHandler { name: about.name, retryable: true })
            }
            (Code::Unavailable, _) => {
                ExecuteError::from(NotExecutedKind::Unavailable { reason: self.message })
            }
            (Code::Refused, _) => ExecuteError::from(NotExecutedKind::NotAccepted { reason: self.message }),
            (Code::CommandIdReused, _) => {
                ExecuteError::from(NotExecutedKind::CommandIdReused { command_id: about.id })
            }
            (Code::IdAhead, _) => ExecuteError::from(NotExecutedKind::IdAhead {
                command_id: about.id,
                claimed: command_id::time(about.id).unwrap_or_default(),
                now: i64::try_from(self.number)
                    .ok()
                    .and_then(DateTime::from_timestamp_millis)
                    .unwrap_or_default(),
            }),
            (Code::ShuttingDown, _) => ExecuteError::from(NotExecutedKind::ShuttingDown),
            (Code::CommandTooLarge, _) => ExecuteError::from(NotExecutedKind::CommandTooLarge {
                size: bytes(self.size),
                limit: bytes(self.number),
            }),
            (Code::Failed | Code::ExpectedVersion | Code::RetriesExhausted | Code::Panicked, _) => {
                ExecuteError::from(NotExecutedKind::Failed { reason: self.message })
            }
        }
    }
}

/// The facts about a command that its caller knows and an answer does not repeat.
#[derive(Debug)]
pub(crate) struct About<'a> {
    pub(crate) id: Uuid,
    pub(crate) name: &'static str,
    pub(crate) stream: Option<&'a StreamId>,
    pub(crate) expected: ExpectedVersion,
}

/// Encodes the answer of an aggregate for another node.
pub(crate) fn tell_receipt<R: Serialize, E: std::error::Error + Serialize>(
    answer: Result<Receipt<R>, ExecuteError<E>>,
) -> Outcome {
    let told = answer.as_ref().map_err(Failure::of).and_then(|receipt| {
        let reply = to_cbor(&receipt.reply).map_err(lost_reply)?;
        let (version, position) = (receipt.version.get(), receipt.position.get());
        let (events, duplicate) = (receipt.events, receipt.duplicate);
        Ok(Done { reply, duplicate, version, position, events, omitted: None })
    });
    told.map_or_else(Outcome::Error, Outcome::Done)
}

/// Creates the outcome of a handled command with a reply that cannot be encoded.
pub(crate) fn lost_reply(error: SerializeError) -> Failure {
    Failure::new(Code::ReplyUnreadable, error.to_string())
}

impl Done {
    pub(crate) fn into_receipt<R: DeserializeOwned, E>(
        self,
        id: Uuid,
        stream: StreamId,
    ) -> Result<Receipt<R>, ExecuteError<E>> {
        let receipt = Receipt {
            command_id: id,
            stream,
            version: Version::new(self.version),
            position: Position::new(self.position),
            events: self.events,
            reply: (),
            duplicate: self.duplicate,
        };
        if let Some(omitted) = self.omitted {
            return Err(omitted.into_error(id, Some(receipt)));
        }
        match from_cbor(&self.reply) {
            Ok(reply) => Ok(receipt.with_reply(reply)),
            Err(reason) => Err(ExecuteError::unreadable_reply(id, Some(receipt), reason)),
        }
    }
}

impl Omitted {
    pub(crate) fn into_error<E>(self, command_id: Uuid, receipt: Option<Receipt>) -> ExecuteError<E> {
        let (size, limit) = (bytes(self.size), bytes(self.limit));
        let receipt = receipt.map(Box::new);
        ExecuteError::NoReply { command_id, receipt, kind: NoReplyKind::TooLarge { size, limit } }
    }
}

fn bytes(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Decodes the reply of a handler.
pub(crate) fn read_reply<R: DeserializeOwned, E>(reply: &[u8], id: Uuid) -> Result<R, ExecuteError<E>> {
    from_cbor(reply).map_err(|reason| ExecuteError::unreadable_reply(id, None, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> String {
        match from_cbor::<T>(bytes) {
            Ok(value) => {
                assert!(from_cbor::<T>(&to_cbor(&value).unwrap()).is_ok());
                "one".into()
            }
            Err(error) => error,
        }
    }

    #[test]
    fn the_wire_format_documents_every_code() {
        // Without `CommandTooLarge`, which is never sent.
        let codes = [
            Code::Rejected,
            Code::ExpectedVersion,
            Code::RetriesExhausted,
            Code::Overloaded,
            Code::Panicked,
            Code::StoreUnavailable,
            Code::OutcomeUnknown,
            Code::NoHandler,
            Code::Unavailable,
            Code::Refused,
            Code::CommandIdReused,
            Code::IdAhead,
            Code::ShuttingDown,
            Code::ReplyUnreadable,
            Code::Failed,
        ];
        let documents = include_str!("../../docs/wire-format.md");
        for code in codes {
            let name = serde_json::to_value(code).unwrap();
            assert!(documents.contains(&format!("`{}`", name.as_str().unwrap())), "{name}");
        }
    }

    #[test]
    fn no_frame_makes_the_reader_panic() {
        let failure = Failure { details: vec![1], number: 7, ..Failure::new(Code::Rejected, "no") };
        let frame = |key, left, expected| CommandFrame {
            format: FORMAT,
            id: Uuid::now_v7(),
            kind: Kind::Aggregate,
            name: "order".into(),
            key,
            payload: vec![0xa0],
            metadata: vec![0xa0],
            expected,
            left,
            sent: left.map(|clock| Sent { node: Uuid::now_v7(), clock }),
            attempt: 2,
            prompt: true,
        };
        let frames =
            [frame(Some("é".into()), Some(u64::MAX), Expected::Exact(3)), frame(None, None, Expected::Any)];
        let omitted = Some(Omitted { size: 9, limit: 8 });
        let done = Done { reply: vec![0xf6], duplicate: true, version: 1, position: 2, events: 3, omitted };
        let says = [
            ReplyKind::Accepted,
            ReplyKind::Alive,
            ReplyKind::Refused(failure.clone()),
            ReplyKind::Executed(Answered { runtime: 5, outcome: Outcome::Done(done) }),
            ReplyKind::Executed(Answered { runtime: 5, outcome: Outcome::Error(failure) }),
        ];
        let replies = says.map(|says| Reply { format: FORMAT, incarnation: Uuid::now_v7(), says });
        let frames = frames.iter().map(to_cbor);
        let seeds = frames.chain(replies.iter().map(to_cbor)).map(Result::unwrap).collect();
        crate::fuzz::fuzz("a command's frames", seeds, |bytes| {
            [told::<CommandFrame>(bytes), told::<Reply>(bytes), told::<Outcome>(bytes)].join("; ")
        });
    }
}
