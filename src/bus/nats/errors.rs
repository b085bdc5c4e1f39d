//! Constructors of [`BusError`] for this driver.

use std::error::Error;
use std::sync::Arc;

use crate::bus::BusError;

/// Creates an `Unavailable` error without a driver error as its source.
pub(super) fn silent(reason: String) -> BusError {
    BusError::Unavailable { reason, source: None }
}

/// Creates an `Unavailable` error with `source`.
pub(super) fn unavailable(what: String, source: impl Error + Send + Sync + 'static) -> BusError {
    BusError::Unavailable { reason: format!("{what}: {source}"), source: Some(Arc::new(source)) }
}

/// Creates an `Incompatible` error.
pub(super) fn incompatible(reason: String) -> BusError {
    BusError::Incompatible { reason }
}
