//! The inputs of an instance, and the answers to its commands.

use std::fmt;

use serde::de::DeserializeOwned;

use super::error::AnswerError;
use crate::codec::from_cbor;

/// An input of an instance.
#[non_exhaustive]
pub enum Input<'a, E> {
    /// An event that a route delivers.
    Event(&'a E),
    /// A command of this instance took effect.
    Done {
        /// Key of the effect.
        effect: &'a str,
        /// Reply of the aggregate or handler.
        reply: Reply<'a>,
    },
    /// A command of this instance was rejected by its aggregate or handler.
    Rejected {
        /// Key of the effect.
        effect: &'a str,
        /// The rejection.
        rejection: Rejection<'a>,
    },
    /// A timer of this instance is due. The timer no longer exists.
    Due {
        /// Name of the timer.
        timer: &'a str,
    },
}

impl<E> Clone for Input<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Input<'_, E> {}

impl<E: fmt::Debug> fmt::Debug for Input<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Event(event) => f.debug_tuple("Event").field(event).finish(),
            Self::Done { effect, .. } => {
                f.debug_struct("Done").field("effect", effect).finish_non_exhaustive()
            }
            Self::Rejected { effect, rejection } => {
                f.debug_struct("Rejected").field("effect", effect).field("rejection", rejection).finish()
            }
            Self::Due { timer } => f.debug_struct("Due").field("timer", timer).finish(),
        }
    }
}

/// The reply to a command of an instance.
#[derive(Clone, Copy)]
pub struct Reply<'a> {
    /// The encoded reply.
    pub(super) encoded: &'a [u8],
}

impl Reply<'_> {
    /// Decodes the reply as the reply type of the aggregate or handler.
    ///
    /// # Errors
    /// If the reply does not decode as this type, or was too large for the command bus.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, AnswerError> {
        decode(self.encoded)
    }
}

impl fmt::Debug for Reply<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("bytes", &self.encoded.len()).finish()
    }
}

/// The rejection of a command of an instance. Displays as the text of the error.
#[derive(Clone, Copy)]
pub struct Rejection<'a> {
    pub(super) message: &'a str,
    /// The encoded error.
    pub(super) encoded: &'a [u8],
}

impl Rejection<'_> {
    /// Decodes the rejection as the error type of the aggregate or handler.
    ///
    /// # Errors
    /// If the rejection does not decode as this type.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, AnswerError> {
        decode(self.encoded)
    }
}

impl fmt::Display for Rejection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message)
    }
}

impl fmt::Debug for Rejection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Rejection").field(&self.message).finish()
    }
}

fn decode<T: DeserializeOwned>(encoded: &[u8]) -> Result<T, AnswerError> {
    from_cbor(encoded).map_err(|reason| AnswerError { reason })
}
