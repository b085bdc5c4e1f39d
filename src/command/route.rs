//! The first destination of a command.

/// The first destination of a command.
#[derive(Debug)]
pub(super) enum Route {
    /// An actor of this process. `others`: whether other nodes can execute the command too.
    Local { others: bool },
    /// Other nodes.
    Remote,
}
