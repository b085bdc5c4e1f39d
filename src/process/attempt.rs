//! Attempts at the commands of an instance.

use std::time::Duration;

use tokio::time::Instant;

use super::event::Effect;
use crate::backoff::Backoff;
use crate::command::Kind;

/// The target of a command, which receives the commands of an instance one after the other.
pub(super) type TargetKey = (Kind, String, String);

/// First and longest wait between two attempts at a command.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// A command that waits, or that is being sent.
pub(super) struct Attempt {
    pub(super) effect: Effect,
    /// Start of the lease's term in which the instance named the command.
    term: Option<Instant>,
    /// Time from which an attempt is the only one, so that a rejection is final.
    pub(super) alone_at: Instant,
    /// Start of this attempt.
    pub(super) started: Instant,
    /// Number of attempts that failed without having an effect.
    pub(super) failures: u32,
    /// Start of the first attempt.
    pub(super) since: Instant,
    pub(super) backoff: Backoff,
}

impl Attempt {
    pub(super) fn new(effect: Effect, term: Option<Instant>, alone_at: Instant) -> Self {
        let (now, backoff) = (Instant::now(), Backoff::new(FIRST_BACKOFF, MAX_BACKOFF));
        Self { effect, term, alone_at, started: now, failures: 0, since: now, backoff }
    }

    /// Returns whether another node may have owned the process since the command was named. `term`:
    /// the start of the present term.
    ///
    /// A handler records its rejections, so they are final.
    pub(super) fn may_be_stale(&self, term: Option<Instant>) -> bool {
        self.effect.command.kind == Kind::Aggregate && (term.is_none() || term != self.term)
    }

    /// Returns whether an earlier attempt may take effect after the rejection of this one.
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
