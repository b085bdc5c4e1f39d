use std::error::Error;

/// What a failing [`Projection::apply`](super::Projection::apply) says; boxed, so that `?` works on every error.
pub type ApplyError = Box<dyn Error + Send + Sync>;

/// What `apply` says when what it writes to cannot be reached: no event is to blame, and the projection tries again for as
/// long as it takes, whatever [`attempts`](super::ProjectionOptions::attempts) say. On every read model, and also as the
/// [source](Error::source) of another error (which `#[error(transparent)]` hides: that hands on only what is below).
///
/// ```
/// # use storied::projection::{ApplyError, TargetUnavailable};
/// # fn send() -> std::io::Result<()> { Ok(()) }
/// fn index() -> Result<(), ApplyError> {
///     Ok(send().map_err(TargetUnavailable::new)?)
/// }
/// # index().unwrap();
/// ```
#[derive(Debug, thiserror::Error)]
#[error("what the projection writes to is unavailable: {0}")]
pub struct TargetUnavailable(#[source] ApplyError);

impl TargetUnavailable {
    /// Because of this.
    pub fn new(source: impl Into<ApplyError>) -> Self {
        Self(source.into())
    }
}

/// An error and what caused it, down to the first cause.
pub(super) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}
