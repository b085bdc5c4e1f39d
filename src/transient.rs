//! Chains of error causes, and the marker of transient errors.

use std::error::Error;

/// A marker in the chain of causes of a transient error: a retry may succeed.
///
/// The marker is a cause because the error's own type may be unknown to the classifying code. The
/// type may be generic, or hidden by `#[error(transparent)]`, which forwards only the causes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("transient error: retry later")]
pub(crate) struct Transient;

/// Returns an error and its causes, from the outermost to the root cause.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}
