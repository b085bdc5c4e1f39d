use crate::store::StoreError;

/// An answer to a command that does not decode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("decoding the answer to a command failed: {reason}; make the type accept the stored form")]
pub struct AnswerError {
    /// Error of the decoder.
    pub reason: String,
}

/// A failed request to an instance, or a failed read of instances.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// No node has ever owned a process of this name.
    #[error("unknown process {process:?}; {}", of_known(known))]
    UnknownProcess {
        /// Name of the process.
        process: String,
        /// The processes that exist.
        known: Vec<String>,
    },
    /// The instance does not exist.
    #[error("process {process} has no instance {instance:?}; check the id")]
    UnknownInstance {
        /// Name of the process.
        process: String,
        /// Id of the instance.
        instance: String,
    },
    /// The instance has ended.
    #[error("changing instance {instance:?} of process {process} failed: it has ended; no request applies")]
    Ended {
        /// Name of the process.
        process: String,
        /// Id of the instance.
        instance: String,
    },
    /// The instance compensates already.
    #[error(
        "changing instance {instance:?} of process {process} failed: it compensates already; wait for its end, or cancel it"
    )]
    Compensating {
        /// Name of the process.
        process: String,
        /// Id of the instance.
        instance: String,
    },
    /// The instance is not parked, so there is nothing to retry.
    #[error(
        "retrying instance {instance:?} of process {process} failed: it is not parked; only a parked instance can retry"
    )]
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

fn of_known(known: &[String]) -> String {
    match known {
        [] => "the store has none, since no node has run one".into(),
        known => format!("the store has {}", known.join(", ")),
    }
}
