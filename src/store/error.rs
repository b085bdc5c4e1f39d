use std::error::Error;
use std::fmt;
use std::sync::Arc;

use super::append::Conflict;
use crate::transient::Transient;

/// A failure of the store, not of what was asked of it. Cheap to clone: one failed transaction answers many callers.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum StoreError {
    /// The store cannot be reached or did not answer in time; nothing was written. Trying again later may help.
    Unavailable {
        /// What was tried and what happened.
        reason: String,
        /// The driver's error.
        source: Option<Arc<dyn Error + Send + Sync>>,
    },
    /// The commit got no answer and looking for the events failed too: they may or may not be in the log. Ask again with
    /// the same event ids, or dispatch the same command id again.
    OutcomeUnknown {
        /// What happened.
        reason: String,
        /// The driver's error.
        source: Option<Arc<dyn Error + Send + Sync>>,
    },
    /// What was asked cannot be stored, whenever it is tried: empty, oversized, not encodable.
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
    /// The database is not the one, or not of the shape, that this program expects.
    Incompatible {
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
        /// What to do.
        advice: String,
    },
    /// What was read cannot have been written by storied.
    Corrupt {
        /// Where and what.
        reason: String,
    },
    /// The disk is full, the file read-only or damaged, rights are missing: a person has to act. Nothing was written.
    Storage {
        /// What the database said.
        reason: String,
        /// The driver's error.
        source: Option<Arc<dyn Error + Send + Sync>>,
    },
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable { reason, .. } => match self.subject() {
                Some(Subject::Other) => f.write_str(reason),
                Some(Subject::ReadModel(_)) => write!(f, "the read model is unavailable: {reason}"),
                None => write!(f, "the event store is unavailable: {reason}"),
            },
            Self::OutcomeUnknown { reason, .. } => write!(
                f,
                "it is unknown whether the append happened: {reason}; repeat the command with the same id to find out"
            ),
            Self::Invalid { reason } => write!(f, "the event store refuses this: {reason}"),
            Self::Incompatible { expected, found, advice } => write!(
                f,
                "the event store does not fit this program: expected {expected}, found {found}; {advice}"
            ),
            Self::Corrupt { reason } => write!(f, "the event store holds something unreadable: {reason}"),
            Self::Storage { reason, .. } => match self.subject() {
                Some(Subject::ReadModel(_)) => write!(f, "the read model cannot write: {reason}"),
                _ => write!(f, "the event store cannot write: {reason}"),
            },
        }
    }
}

impl Error for StoreError {
    /// The driver's error. A transient error without one has a cause that says so, for errors that hand on only the causes.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unavailable { source, .. }
            | Self::OutcomeUnknown { source, .. }
            | Self::Storage { source, .. } => match source {
                Some(source) => Some(&**source),
                None => Some(&Transient),
            },
            Self::Invalid { .. } | Self::Incompatible { .. } | Self::Corrupt { .. } => None,
        }
    }
}

impl From<crate::invalid_option::InvalidOption> for StoreError {
    fn from(error: crate::invalid_option::InvalidOption) -> Self {
        Self::Invalid { reason: error.to_string() }
    }
}

impl StoreError {
    /// Whether the same call may succeed later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, StoreError::Unavailable { .. } | StoreError::OutcomeUnknown { .. })
    }

    /// What kind of failure it is, in one word.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable { .. } => "unavailable",
            Self::OutcomeUnknown { .. } => "outcome_unknown",
            Self::Invalid { .. } => "invalid",
            Self::Incompatible { .. } => "incompatible",
            Self::Corrupt { .. } => "corrupt",
            Self::Storage { .. } => "storage",
        }
    }

    /// [`Unavailable`](Self::Unavailable), for a `reason` that is a sentence about another subject than the event store.
    pub(crate) fn not_now(reason: String) -> Self {
        Self::Unavailable { reason, source: Some(Arc::new(Subject::Other)) }
    }

    /// The error of a call to a read model in a database.
    pub(crate) fn of_read_model(self) -> Self {
        let marked = |source: Option<_>| Some(Arc::new(Subject::ReadModel(source)) as Arc<_>);
        match self {
            own if own.subject().is_some() => own,
            Self::Unavailable { reason, source } => Self::Unavailable { reason, source: marked(source) },
            Self::Storage { reason, source } => Self::Storage { reason, source: marked(source) },
            other => other,
        }
    }

    fn subject(&self) -> Option<&Subject> {
        match self {
            Self::Unavailable { source: Some(source), .. } | Self::Storage { source: Some(source), .. } => {
                source.downcast_ref()
            }
            _ => None,
        }
    }

    /// [`Unavailable`](Self::Unavailable), with the driver's error as source.
    pub fn unavailable(reason: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self::Unavailable { reason: reason.into(), source: Some(Arc::new(source)) }
    }

    /// [`Storage`](Self::Storage), with the driver's error as source.
    pub fn storage(reason: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self::Storage { reason: reason.into(), source: Some(Arc::new(source)) }
    }
}

/// The subject of a [`StoreError`] that is not the event store, in its chain of causes.
#[derive(Debug)]
enum Subject {
    /// A read model, with the driver's error.
    ReadModel(Option<Arc<dyn Error + Send + Sync>>),
    /// The one that the reason names.
    Other,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReadModel(_) => f.write_str("the read model failed"),
            Self::Other => Transient.fmt(f),
        }
    }
}

impl Error for Subject {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::ReadModel(Some(source)) => Some(&**source),
            Self::ReadModel(None) | Self::Other => Some(&Transient),
        }
    }
}

/// Why an append was not taken.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// A stream was not as expected; nothing of the append was written.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
