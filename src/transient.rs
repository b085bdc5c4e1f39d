//! Chains of causes, and the mark of errors that do not last.

use std::error::Error;

/// The cause of an error that says nothing about what was asked: trying again may help.
///
/// It stands in the chain of causes because an error's own type may not be known where that matters: it may be generic, or hidden by
/// `#[error(transparent)]`, which hands on the causes only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is transient: trying again later may help")]
pub(crate) struct Transient;

/// An error and its causes, down to the first one.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}
