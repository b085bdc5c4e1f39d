//! The options of commands over NATS.

use std::time::Duration;

use crate::bus::{BusError, NatsOptions};
use crate::invalid_option::{InvalidOption, within};

/// Options of commands over NATS.
///
/// Create them from a URL, or from [`NatsOptions`] for logins, TLS and the namespace. Options about
/// events and streams have no effect here.
///
/// ```
/// use std::time::Duration;
/// use storied::NatsOptions;
/// use storied::command::{CommandBus, NatsCommandOptions};
///
/// let options = NatsOptions::core().url("nats://nats-1:4222,nats://nats-2:4222").namespace("shop");
/// let bus = CommandBus::nats(NatsCommandOptions::new(options).node("shop-1"));
/// # let _ = bus;
/// ```
#[derive(Debug, Clone)]
pub struct NatsCommandOptions {
    pub(super) options: NatsOptions,
    pub(super) node: Option<String>,
    pub(super) beat: Duration,
    pub(super) in_flight: usize,
}

impl NatsCommandOptions {
    /// Creates options with this connection and the defaults.
    #[must_use]
    pub fn new(options: NatsOptions) -> Self {
        Self { options, node: None, beat: Duration::from_secs(1), in_flight: 4_096 }
    }

    /// Sets the name of this node.
    ///
    /// A node that comes back under its name owns the same aggregates as before. If two nodes have
    /// the same name, the one with the later start counts. Default: a new name with every start.
    /// Range: 1 to 200 characters, checked at the start of the runtime.
    #[must_use]
    pub fn node(mut self, name: impl Into<String>) -> Self {
        self.node = Some(name.into());
        self
    }

    /// Sets the heartbeat interval, for the presence of a node and for commands in flight.
    ///
    /// A node that is silent for 3.5 intervals counts as lost. A command of another node waits at
    /// most one interval for a permit of a full aggregate or handler. The interval must be the same
    /// on all nodes. Default: 1 s. Range: 10 ms to 1 h.
    #[must_use]
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.beat = every;
        self
    }

    /// Sets the maximum number of commands in flight to other nodes, and from other nodes.
    ///
    /// A further command of this node waits for 1 s, then fails with `Overloaded`. A further
    /// command of another node goes to the next node at once. Default: 4,096. Range: 1 to
    /// 1,048,576.
    #[must_use]
    pub fn max_in_flight(mut self, commands: usize) -> Self {
        self.in_flight = commands;
        self
    }

    /// Rejects options that are out of range.
    pub(in crate::command) fn validate(&self) -> Result<(), InvalidOption> {
        let beat = Duration::from_millis(10)..=Duration::from_secs(3_600);
        within("NatsCommandOptions::heartbeat", self.beat, beat)?;
        within("NatsCommandOptions::max_in_flight", self.in_flight, 1..=1 << 20)
    }

    /// Rejects options with which no connection can work.
    pub(in crate::command) fn check(&self) -> Result<(), BusError> {
        self.options.check()?;
        match &self.node {
            Some(name)
                if name.trim().is_empty()
                    || name.chars().count() > 200
                    || name.contains(char::is_control) =>
            {
                let shown: String = name.chars().take(80).collect();
                let reason = format!("invalid node name {shown:?}: use 1 to 200 printable characters");
                Err(BusError::Incompatible { reason })
            }
            _ => Ok(()),
        }
    }
}

impl From<NatsOptions> for NatsCommandOptions {
    fn from(options: NatsOptions) -> Self {
        Self::new(options)
    }
}

impl From<&str> for NatsCommandOptions {
    fn from(url: &str) -> Self {
        Self::new(NatsOptions::core().url(url))
    }
}

impl From<String> for NatsCommandOptions {
    fn from(url: String) -> Self {
        Self::new(NatsOptions::core().url(url))
    }
}
