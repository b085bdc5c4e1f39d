//! The commands that a handler sends through its context.

use std::fmt;

use super::Handler;
use super::context::HandlerContext;
use crate::aggregate::Aggregate;
use crate::command::target::{ToAggregate, ToHandler};
use crate::command::wire::Kind;
use crate::command::{Command, Execute, ExecuteCommand};
use crate::event::Event;

impl HandlerContext {
    /// Sends a command to an aggregate on any node.
    ///
    /// It works as [`Runtime::execute`](crate::Runtime::execute), with this command as the cause.
    /// The id is derived from this command's id, the aggregate, and the number of earlier commands
    /// to it. The command has at most the time that is left to this attempt
    /// ([`HandlerOptions::time_limit`](super::HandlerOptions::time_limit)).
    pub fn execute<A: Aggregate>(
        &self,
        id: impl fmt::Display,
        command: impl Into<A::Command>,
    ) -> Execute<ToAggregate<A>> {
        let id = id.to_string();
        let envelope = self.envelope(Kind::Aggregate, <A::Event as Event>::CATEGORY, &id);
        Execute::new(self.commands.clone(), Some(id), command.into(), envelope).within(self.slot.clone())
    }

    /// Sends a command with its own type of reply, as [`execute`](Self::execute) does.
    pub fn execute_command<C: Command>(&self, id: impl fmt::Display, command: C) -> ExecuteCommand<C> {
        ExecuteCommand::new(self.execute::<C::Aggregate>(id, command))
    }

    /// Sends a command to a handler on any node, as [`execute`](Self::execute) does.
    ///
    /// A command with the key of the current command waits for it until the time limit.
    pub fn execute_handler<H: Handler>(&self, command: H::Command) -> Execute<ToHandler<H>> {
        let key = H::key(&command).unwrap_or_default();
        let envelope = self.envelope(Kind::Handler, H::NAME, &key);
        Execute::new(self.commands.clone(), None, command, envelope).within(self.slot.clone())
    }
}
