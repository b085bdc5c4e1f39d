//! The commands of a driver to its instance.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::event::{Trail, Trigger};
use super::options::{Limits, ProcessOptions};
use super::routes::RouteKind;
use crate::event::Version;

/// A command of the driver to an instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct InstanceCommand {
    pub(super) kind: CommandKind,
    /// Whether the driver knows none of the open effects, and wants all of them.
    pub(super) resend: bool,
    #[serde(skip, default = "limits")]
    pub(super) limits: Limits,
}

/// Instances execute on the node of their driver, so no command is ever decoded.
fn limits() -> Limits {
    ProcessOptions::new().limits
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum CommandKind {
    /// Consume an event. `late`: the follower had parked it, so later events came first.
    Deliver { id: Uuid, trigger: Box<Trigger>, route: RouteKind, trail: Trail, late: bool },
    /// Consume the answer to a command.
    Settle { effect: Uuid, answer: Settlement },
    /// Consume a timer that is due.
    Fire { timer: String, version: Version },
    /// Park the instance because an effect failed permanently.
    Park { effect: Uuid, reason: String },
    /// Do what is left to do: a request, an undo command, or a reaction to a held input.
    Advance,
}

/// The answer to a command of an instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Settlement {
    Done { reply: Vec<u8> },
    Rejected { message: String, details: Vec<u8> },
}
