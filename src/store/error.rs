use std::error::Error;
use std::fmt;
use std::sync::Arc;

use crate::transient::Transient;

/// A failure of the store, not of the request.
///
/// Cheap to clone: one failed transaction answers many callers.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum StoreError {
    /// The store cannot be reached or did not answer in time; nothing was written. Retry later.
    Unavailable {
        /// Attempted operation and cause.
        reason: String,
        /// Error of the driver.
        source: Option<Arc<dyn Error + Send + Sync>>,
    },
    /// The commit got no answer, and looking up the events failed too.
    ///
    /// The events may or may not be in the log. Repeat the call with the same event ids, or the
    /// command with the same command id.
    OutcomeUnknown {
        /// Cause.
        reason: String,
        /// Error of the driver.
        source: Option<Arc<dyn Error + Send + Sync>>,
    },
    /// The request can never be stored: it is empty, too large or not encodable.
    Invalid {
        /// Cause.
        reason: String,
    },
    /// The database is another one than this program expects, or has another schema.
    Incompatible {
        /// Expected value.
        expected: String,
        /// Found value.
        found: String,
        /// Remedy.
        advice: String,
    },
    /// The server refuses the login, or its settings, database or tables are not the required ones.
    ///
    /// An operator has to act. A start ends at once; a running projection retries.
    Misconfigured {
        /// Expected value.
        expected: String,
        /// Found value.
        found: String,
        /// Remedy.
        advice: String,
    },
    /// The data read cannot have been written by storied.
    Corrupt {
        /// Location and cause.
        reason: String,
    },
    /// The disk is full, the file read-only or damaged, or rights are missing; nothing was written.
    ///
    /// An operator has to act.
    Storage {
        /// Message of the database.
        reason: String,
        /// Error of the driver.
        source: Option<Arc<dyn Error + Send + Sync>>,
    },
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable { reason, .. } => match self.is_of_read_model() {
                true => write!(f, "the read model is unavailable: {reason}"),
                false => write!(f, "the event store is unavailable: {reason}"),
            },
            Self::OutcomeUnknown { reason, .. } => {
                write!(f, "append outcome unknown: {reason}; repeat the command with the same id")
            }
            Self::Invalid { reason } => write!(f, "invalid request to the event store: {reason}"),
            Self::Incompatible { expected, found, advice }
            | Self::Misconfigured { expected, found, advice } => {
                write!(f, "incompatible event store: expected {expected}, found {found}; {advice}")
            }
            Self::Corrupt { reason } => write!(f, "unreadable data in the event store: {reason}"),
            Self::Storage { reason, .. } => match self.is_of_read_model() {
                true => write!(f, "the read model cannot write: {reason}"),
                false => write!(f, "the event store cannot write: {reason}"),
            },
        }
    }
}

impl Error for StoreError {
    /// Returns the driver's error.
    ///
    /// A transient error without a driver's error returns `Transient`, for errors that pass on only
    /// their causes.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unavailable { source, .. }
            | Self::OutcomeUnknown { source, .. }
            | Self::Storage { source, .. } => match source {
                Some(source) => Some(&**source),
                None => Some(&Transient),
            },
            Self::Invalid { .. }
            | Self::Incompatible { .. }
            | Self::Misconfigured { .. }
            | Self::Corrupt { .. } => None,
        }
    }
}

impl From<crate::invalid_option::InvalidOption> for StoreError {
    fn from(error: crate::invalid_option::InvalidOption) -> Self {
        Self::Invalid { reason: error.to_string() }
    }
}

impl StoreError {
    /// Returns whether the same call may succeed later without any intervention.
    pub fn is_transient(&self) -> bool {
        matches!(self, StoreError::Unavailable { .. } | StoreError::OutcomeUnknown { .. })
    }

    /// Returns whether a running task retries: the error says nothing about data or request.
    pub(crate) fn may_pass(&self) -> bool {
        self.is_transient() || matches!(self, Self::Misconfigured { .. })
    }

    /// Returns the kind of failure, as one word.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable { .. } => "unavailable",
            Self::OutcomeUnknown { .. } => "outcome_unknown",
            Self::Invalid { .. } => "invalid",
            Self::Incompatible { .. } => "incompatible",
            Self::Misconfigured { .. } => "misconfigured",
            Self::Corrupt { .. } => "corrupt",
            Self::Storage { .. } => "storage",
        }
    }

    /// Marks the error as one of a read model in a database.
    pub(crate) fn of_read_model(self) -> Self {
        let marked = |source: Option<_>| Some(Arc::new(ReadModelFailure(source)) as Arc<_>);
        match self {
            own if own.is_of_read_model() => own,
            Self::Unavailable { reason, source } => Self::Unavailable { reason, source: marked(source) },
            Self::Storage { reason, source } => Self::Storage { reason, source: marked(source) },
            other => other,
        }
    }

    fn is_of_read_model(&self) -> bool {
        match self {
            Self::Unavailable { source: Some(source), .. } | Self::Storage { source: Some(source), .. } => {
                source.is::<ReadModelFailure>()
            }
            _ => false,
        }
    }

    /// Creates an [`Unavailable`](Self::Unavailable) with the driver's error as source.
    pub fn unavailable(reason: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self::Unavailable { reason: reason.into(), source: Some(Arc::new(source)) }
    }

    /// Creates a [`Storage`](Self::Storage) error with the driver's error as source.
    pub fn storage(reason: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self::Storage { reason: reason.into(), source: Some(Arc::new(source)) }
    }
}

/// Marks a [`StoreError`] of a read model in its chain of causes; has the driver's error.
#[derive(Debug)]
struct ReadModelFailure(Option<Arc<dyn Error + Send + Sync>>);

impl fmt::Display for ReadModelFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the read model failed")
    }
}

impl Error for ReadModelFailure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.0 {
            Some(source) => Some(&**source),
            None => Some(&Transient),
        }
    }
}
