//! The command bus: its transport, filters and hooks, and its status.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::hooks::{CommandEnd, CommandHooks, CommandInfo};
#[cfg(feature = "nats")]
use super::nats::NatsCommandOptions;
use crate::bus::BusError;
use crate::invalid_option::{DAY, InvalidOption, within};

/// Default retention of the records of handlers' commands.
const KEEP_RECORDS: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The transport of commands: within this process ([`local`](Self::local)) or between nodes.
///
/// A command bus is not an event bus. It has its own connection and subjects, and sends every
/// command to the node that owns it. It has no queue groups, because they would send commands to
/// nodes that do not own them:
///
/// ```compile_fail,E0599
/// # use storied::command::CommandBus;
/// let bus = CommandBus::nats("nats://127.0.0.1:4222").queue_group("workers");
/// ```
///
/// ```compile_fail,E0308
/// # use storied::{NatsBus, Runtime};
/// let bus = NatsBus::core("nats://127.0.0.1:4222");
/// let builder = Runtime::builder().commands(bus);
/// ```
///
/// Filters and hooks run on the node that executes a command, on every caller's behalf. They run
/// for decisions, too ([`Runtime::decide`](crate::Runtime::decide)), on the node of the caller.
#[derive(Debug, Clone)]
pub struct CommandBus {
    hooks: CommandHooks,
    command_retention: Duration,
    #[cfg(feature = "nats")]
    pub(super) nats: Option<NatsCommandOptions>,
}

impl Default for CommandBus {
    fn default() -> Self {
        Self::local()
    }
}

impl CommandBus {
    /// Creates a bus whose commands stay within this process. This is the default.
    #[must_use]
    pub fn local() -> Self {
        Self {
            hooks: CommandHooks::default(),
            command_retention: KEEP_RECORDS,
            #[cfg(feature = "nats")]
            nats: None,
        }
    }

    /// Creates a bus that reaches all nodes with the same NATS servers, namespace and event store.
    ///
    /// Accepts a URL or [`NatsCommandOptions`]. During an outage of NATS, this node executes the commands
    /// that it handles. Other commands fail at once with `Unavailable` and are not kept. Deadlines
    /// travel as the time left, so the clocks of the nodes may differ.
    #[cfg(feature = "nats")]
    #[must_use]
    pub fn nats(options: impl Into<NatsCommandOptions>) -> Self {
        Self { nats: Some(options.into()), ..Self::local() }
    }

    /// Adds a filter: this node accepts only commands for which all filters return `true`.
    ///
    /// A command that this node does not accept goes to another node. A decision does not: it fails
    /// with [`NotAccepted`](super::NotExecutedKind::NotAccepted).
    #[must_use]
    pub fn filter(mut self, filter: impl Fn(&CommandInfo<'_>) -> bool + Send + Sync + 'static) -> Self {
        self.hooks.add_filter(Arc::new(filter));
        self
    }

    /// Adds a hook that runs before every command. It must not block.
    ///
    /// An error of the hook refuses the command, which then goes to no other node.
    #[must_use]
    pub fn before_all(
        mut self,
        hook: impl Fn(&CommandInfo<'_>) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.add_before(None, Arc::new(hook));
        self
    }

    /// Adds a hook that runs before every command of one aggregate category, handler or decision.
    #[must_use]
    pub fn before(
        mut self,
        name: impl Into<String>,
        hook: impl Fn(&CommandInfo<'_>) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.add_before(Some(name.into()), Arc::new(hook));
        self
    }

    /// Adds a hook that runs after every accepted command, for every result. It must not block.
    #[must_use]
    pub fn after_all(mut self, hook: impl Fn(&CommandInfo<'_>, &CommandEnd) + Send + Sync + 'static) -> Self {
        self.hooks.add_after(None, Arc::new(hook));
        self
    }

    /// Adds a hook that runs after every command of one aggregate category, handler or decision.
    #[must_use]
    pub fn after(
        mut self,
        name: impl Into<String>,
        hook: impl Fn(&CommandInfo<'_>, &CommandEnd) + Send + Sync + 'static,
    ) -> Self {
        self.hooks.add_after(Some(name.into()), Arc::new(hook));
        self
    }

    /// Sets how long the store keeps the records of handlers' commands.
    ///
    /// A handler's command id takes effect once within this time. The store deletes older records
    /// within 1 hour. Default: 7 days. Range: 1 min to 36,500 days.
    #[must_use]
    pub fn command_retention(mut self, age: Duration) -> Self {
        self.command_retention = age;
        self
    }

    /// Rejects options that are out of range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        let range = Duration::from_secs(60)..=DAY.saturating_mul(36_500);
        within("CommandBus::command_retention", self.command_retention, range)?;
        #[cfg(feature = "nats")]
        if let Some(nats) = &self.nats {
            nats.validate()?;
        }
        Ok(())
    }

    /// Rejects options with which no connection can work.
    pub(crate) fn check(&self) -> Result<(), BusError> {
        #[cfg(feature = "nats")]
        if let Some(nats) = &self.nats {
            return nats.check();
        }
        Ok(())
    }

    pub(crate) fn retention(&self) -> Duration {
        self.command_retention
    }

    pub(crate) fn hooks(&self) -> CommandHooks {
        self.hooks.clone()
    }
}

/// The status of a node's command bus.
///
/// Serializes as `"local"`, `{"connected": {"nodes": …, "last_error": …}}`,
/// `{"incompatible": {"reason": …}}` or `{"disconnected": {"reason": …}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CommandBusStatus {
    /// Commands stay within this process.
    Local,
    /// Commands reach these other nodes.
    Connected {
        /// Names of the other nodes, sorted.
        ///
        /// Nodes without a recent heartbeat are candidates of last resort.
        nodes: Vec<String>,
        /// Last asynchronous error of the NATS server, for example a missing permission.
        ///
        /// `None` after a reconnect.
        last_error: Option<String>,
    },
    /// The store [does not belong](crate::store::Adoption) to its database.
    ///
    /// Commands stay within this process.
    Incompatible {
        /// Cause and remedy.
        reason: String,
    },
    /// There is no connection. The node retries without limit.
    Disconnected {
        /// Cause.
        reason: String,
    },
}
