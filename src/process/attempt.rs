//! Attempts at the commands of an instance.

use tokio::time::Instant;

use super::event::Effect;
use crate::backoff::Backoff;
use crate::command::Kind;

/// The target of a command, which receives the commands of an instance one after the other.
pub(super) type TargetKey = (Kind, String, String);

/// A command that is being sent.
pub(super) struct Attempt {
    pub(super) effect: Effect,
    /// Time from which an attempt is the only one, so that a rejection is final.
    pub(super) alone_at: Instant,
    /// Start of this attempt.
    pub(super) started: Instant,
    pub(super) failures: u32,
    pub(super) since: Instant,
    pub(super) backoff: Backoff,
}

impl Attempt {
    /// Returns whether an earlier attempt may take effect after the rejection of this one.
    ///
    /// A handler records its rejections, so they are final.
    pub(super) fn may_have_rival(&self) -> bool {
        self.effect.command.kind == Kind::Aggregate && self.started < self.alone_at
    }
}

pub(super) fn target_of(effect: &Effect) -> TargetKey {
    let command = &effect.command;
    // Commands without a key have no order.
    let target = command.target.clone().unwrap_or_else(|| effect.id.to_string());
    (command.kind, command.name.clone(), target)
}
