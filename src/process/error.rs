use crate::store::StoreError;

/// An answer to a command that does not decode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the answer to a command does not decode: {reason}; let the type read the form that was written")]
pub struct AnswerError {
    /// Error of the decoder.
    pub reason: String,
}

/// A request to an instance that was not recorded.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The instance does not exist.
    #[error("process {process} has no instance {instance:?}")]
    Unknown {
        /// Name of the process.
        process: String,
        /// Id of the instance.
        instance: String,
    },
    /// The instance has ended.
    #[error("instance {instance:?} of process {process} has ended")]
    Ended {
        /// Name of the process.
        process: String,
        /// Id of the instance.
        instance: String,
    },
    /// The instance compensates already.
    #[error("instance {instance:?} of process {process} compensates already")]
    Compensating {
        /// Name of the process.
        process: String,
        /// Id of the instance.
        instance: String,
    },
    /// The instance is not parked, so there is nothing to retry.
    #[error("instance {instance:?} of process {process} is not parked")]
    NotParked {
        /// Name of the process.
        process: String,
        /// Id of the instance.
        instance: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
