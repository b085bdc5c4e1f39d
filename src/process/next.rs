//! The outcome of a reaction: commands, timers, and the end of the instance.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::event::{Due, EncodedCommand};
use crate::aggregate::Aggregate;
use crate::codec::to_cbor;
use crate::command::{Handler, Kind};
use crate::event::{Event, StreamId};

/// The outcome of a reaction: commands to send, timers to start or cancel, and perhaps the end.
///
/// All of it is stored in one append, together with the input. The commands are sent after that.
/// Commands to one target are sent in their order, each after the answer to the one before; commands
/// to different targets are sent concurrently.
#[derive(Default)]
#[must_use = "a reaction has an effect only if it is returned"]
pub struct Next {
    pub(super) steps: Vec<Step>,
    pub(super) end: Option<End>,
    /// The first reason why the reaction is unusable.
    pub(super) problem: Option<String>,
}

pub(super) enum Step {
    Execute { key: String, command: EncodedCommand, undo: Option<EncodedCommand> },
    Start { timer: String, due: Due },
    Cancel { timer: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Complete,
    Compensate,
}

impl Next {
    /// Creates a reaction without effects, to add some.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a reaction without effects.
    pub fn none() -> Self {
        Self::default()
    }

    /// Creates a reaction that undoes what the instance has done.
    ///
    /// All timers are cancelled. When all open commands are answered, the declared
    /// [undo](Self::undo) of each command that took effect is executed, the last one first, each
    /// after the answer to the one before. Then the instance has ended. Meanwhile it does not react
    /// to further inputs. A rejected undo parks the instance.
    pub fn compensate() -> Self {
        Self { end: Some(End::Compensate), ..Self::default() }
    }

    /// Sends a command to an aggregate on any node.
    ///
    /// The answer is an [`Input::Done`](super::Input::Done) or
    /// [`Input::Rejected`](super::Input::Rejected) with this key. The key is unique in a reaction.
    pub fn execute<A: Aggregate>(
        self,
        key: impl Into<String>,
        id: impl fmt::Display,
        command: impl Into<A::Command>,
    ) -> Self {
        let command = to_aggregate::<A>(id, &command.into());
        self.effect(key.into(), command)
    }

    /// Sends a command to a handler on any node, as [`execute`](Self::execute) does.
    ///
    /// A handler recognises a repeated command for the
    /// [retention](crate::CommandBus::command_retention) of the command bus. If an instance is parked
    /// for longer while a command has no known outcome, a retry may execute this command again.
    pub fn execute_handler<H: Handler>(self, key: impl Into<String>, command: H::Command) -> Self {
        let command = to_handler::<H>(&command);
        self.effect(key.into(), command)
    }

    /// Declares the command that undoes the last [`execute`](Self::execute), for
    /// [`compensate`](Self::compensate).
    pub fn undo<A: Aggregate>(self, id: impl fmt::Display, command: impl Into<A::Command>) -> Self {
        let command = to_aggregate::<A>(id, &command.into());
        self.undo_by(command)
    }

    /// Declares the command of a handler that undoes the last [`execute`](Self::execute).
    pub fn undo_handler<H: Handler>(self, command: H::Command) -> Self {
        let command = to_handler::<H>(&command);
        self.undo_by(command)
    }

    /// Starts a timer that is due after `wait`, by the clock of the store.
    ///
    /// It replaces a timer of the same name. When it is due, the instance receives an
    /// [`Input::Due`](super::Input::Due). The wait begins when the timer is stored, usually
    /// milliseconds after the reaction.
    pub fn after(self, timer: impl Into<String>, wait: Duration) -> Self {
        let due = Due::After(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
        self.timer(timer.into(), due)
    }

    /// Starts a timer that is due at a time, by the clock of the store. A time in the past is due at
    /// once.
    ///
    /// It replaces a timer of the same name.
    pub fn at(self, timer: impl Into<String>, time: DateTime<Utc>) -> Self {
        self.timer(timer.into(), Due::At(time))
    }

    /// Cancels a timer. Has no effect if there is no such timer.
    pub fn cancel(mut self, timer: impl Into<String>) -> Self {
        self.steps.push(Step::Cancel { timer: timer.into() });
        self
    }

    /// Ends the instance. Its open commands, those of this reaction included, are still sent.
    ///
    /// The instance reacts to no further input. Its timers are cancelled.
    pub fn complete(mut self) -> Self {
        if self.end == Some(End::Compensate) {
            self.fail("a reaction completes and compensates".into());
        }
        self.end = Some(End::Complete);
        self
    }

    fn effect(mut self, key: String, command: Result<EncodedCommand, String>) -> Self {
        if self.end == Some(End::Compensate) {
            self.fail(format!("a reaction compensates and executes {key:?}"));
        }
        let duplicate = |step: &Step| matches!(step, Step::Execute { key: known, .. } if *known == key);
        if self.steps.iter().any(duplicate) {
            self.fail(format!("a reaction has two commands with the key {key:?}"));
        }
        match command {
            Ok(command) => self.steps.push(Step::Execute { key, command, undo: None }),
            Err(reason) => self.fail(format!("the command {key:?} is invalid: {reason}")),
        }
        self
    }

    fn undo_by(mut self, command: Result<EncodedCommand, String>) -> Self {
        let last = self.steps.iter_mut().rev().find_map(|step| match step {
            Step::Execute { key, undo, .. } => Some((key, undo)),
            _ => None,
        });
        let problem = match (last, command) {
            (Some((_, undo @ None)), Ok(command)) => {
                *undo = Some(command);
                None
            }
            (Some((key, Some(_))), _) => Some(format!("the command {key:?} has two undo commands")),
            (Some((key, _)), Err(reason)) => {
                Some(format!("the undo command of {key:?} is invalid: {reason}"))
            }
            (None, _) => Some("an undo command follows no command".into()),
        };
        if let Some(problem) = problem {
            self.fail(problem);
        }
        self
    }

    fn timer(mut self, timer: String, due: Due) -> Self {
        if self.end == Some(End::Compensate) {
            self.fail(format!("a reaction compensates and starts the timer {timer:?}"));
        }
        if let Some(reason) = timer_problem(&timer) {
            self.fail(format!(
                "invalid timer name {:?}: {reason}",
                timer.chars().take(80).collect::<String>()
            ));
        }
        self.steps.push(Step::Start { timer, due });
        self
    }

    fn fail(&mut self, problem: String) {
        self.problem.get_or_insert(problem);
    }
}

/// Returns why a text is no name of a timer.
fn timer_problem(name: &str) -> Option<&'static str> {
    match name {
        "" => Some("empty"),
        _ if name.len() > 200 => Some("longer than 200 bytes"),
        _ if name.contains(char::is_control) => Some("control character"),
        _ => None,
    }
}

fn to_aggregate<A: Aggregate>(id: impl fmt::Display, command: &A::Command) -> Result<EncodedCommand, String> {
    let name = <A::Event as Event>::CATEGORY.to_owned();
    let id = StreamId::new(&name, id).map_err(|error| error.to_string())?.id().to_owned();
    let payload = to_cbor(command).map_err(|error| error.to_string())?;
    Ok(EncodedCommand { kind: Kind::Aggregate, name, target: Some(id), payload })
}

fn to_handler<H: Handler>(command: &H::Command) -> Result<EncodedCommand, String> {
    let payload = to_cbor(command).map_err(|error| error.to_string())?;
    Ok(EncodedCommand { kind: Kind::Handler, name: H::NAME.to_owned(), target: H::key(command), payload })
}

impl fmt::Debug for Next {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = |step: &Step| match step {
            Step::Execute { key, command, undo } => {
                let target = command.target.as_deref().unwrap_or_default();
                let undo = if undo.is_some() { ", with undo" } else { "" };
                format!("execute {key:?} on {}/{target}{undo}", command.name)
            }
            Step::Start { timer, due } => format!("start timer {timer:?} {due:?}"),
            Step::Cancel { timer } => format!("cancel timer {timer:?}"),
        };
        f.debug_struct("Next")
            .field("steps", &self.steps.iter().map(step).collect::<Vec<_>>())
            .field("end", &self.end)
            .field("problem", &self.problem)
            .finish()
    }
}
