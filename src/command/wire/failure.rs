//! The error of a command, as a node sends it and a record keeps it.

use chrono::DateTime;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::aggregate::{ExecuteError, NoReplyKind, NotExecutedKind};
use crate::codec::{SerializeError, byte_string, from_cbor, to_cbor};
use crate::command_id;
use crate::event::{StreamId, Version};
use crate::outage::is_store_outage;
use crate::panic::text_of;
use crate::store::{ExpectedVersion, StoreError};

/// Maximum length of the message of a shortened error, in characters.
const SHORTENED: usize = 1_000;

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
    /// Whether a cause that the command does not have, such as a full disk, made it fail.
    ///
    /// Set only if the code does not show it: the same command may succeed later.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(crate) outage: bool,
    /// Size that exceeds the limit, in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) size: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(flag: &bool) -> bool {
    !flag
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
    pub(super) fn shortened(self, size: usize, limit: usize) -> Self {
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
        let text = text_of(error);
        match error {
            ExecuteError::Rejected(rejection) => match to_cbor(rejection) {
                Ok(details) => Self { details, ..Self::new(Code::Rejected, text) },
                Err(error) => Self::new(Code::Failed, format!("{text} (details cannot be encoded: {error})")),
            },
            ExecuteError::NotExecuted { kind, .. } => Self::of_kind(kind, text),
            ExecuteError::OutcomeUnknown { reason, .. } => Self::new(Code::OutcomeUnknown, reason),
            ExecuteError::NoReply { kind: NoReplyKind::TooLarge { .. }, .. } => {
                Self::new(Code::OutcomeUnknown, text)
            }
            ExecuteError::NoReply { kind: NoReplyKind::Unreadable { reason }, .. } => {
                Self::new(Code::ReplyUnreadable, reason)
            }
        }
    }

    fn of_kind(kind: &NotExecutedKind, text: String) -> Self {
        let with = |code, message: &str, number| Self { number, ..Self::new(code, message) };
        match kind {
            NotExecutedKind::ExpectedVersion { actual, .. } => {
                with(Code::ExpectedVersion, &text, actual.get())
            }
            NotExecutedKind::RetriesExhausted { attempts, .. } => {
                with(Code::RetriesExhausted, &text, u64::from(*attempts))
            }
            NotExecutedKind::Overloaded { what, limit } => with(Code::Overloaded, what, *limit as u64),
            NotExecutedKind::Panicked { message, .. } => Self::new(Code::Panicked, message),
            NotExecutedKind::Store(StoreError::Unavailable { reason, .. }) => {
                Self::new(Code::StoreUnavailable, reason)
            }
            NotExecutedKind::Store(error) if is_store_outage(error) => {
                Self { outage: true, ..Self::new(Code::Failed, text) }
            }
            NotExecutedKind::NoHandler { .. } => Self::new(Code::NoHandler, text),
            NotExecutedKind::Unavailable { reason } => Self::new(Code::Unavailable, reason),
            NotExecutedKind::Restarting { .. } => Self::new(Code::Unavailable, text),
            NotExecutedKind::NotAccepted { reason } => Self::new(Code::Refused, reason),
            NotExecutedKind::CommandIdReused { .. } => Self::new(Code::CommandIdReused, text),
            NotExecutedKind::IdAhead { now, .. } => {
                with(Code::IdAhead, &text, u64::try_from(now.timestamp_millis()).unwrap_or(0))
            }
            NotExecutedKind::ShuttingDown => Self::new(Code::ShuttingDown, text),
            NotExecutedKind::Failed { reason } => Self::new(Code::Failed, reason),
            _ => Self::new(Code::Failed, text),
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

/// Creates the outcome of a handled command with a reply that cannot be encoded.
pub(crate) fn lost_reply(error: SerializeError) -> Failure {
    Failure::new(Code::ReplyUnreadable, error.to_string())
}

pub(super) fn bytes(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::Code;

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
        let documents = include_str!("../../../docs/wire-format.md");
        for code in codes {
            let name = serde_json::to_value(code).unwrap();
            assert!(documents.contains(&format!("`{}`", name.as_str().unwrap())), "{name}");
        }
    }
}
