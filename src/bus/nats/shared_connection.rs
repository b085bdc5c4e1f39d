//! The connection for commands: the options of a bus connection, without its subjects.

use std::sync::Arc;

use async_nats::Client;
use tokio::sync::watch;

use super::connection::{Connection, Echo, Link};
use super::nats_bus::NatsBus;
use super::options::NatsOptions;
use crate::bus::{BusError, BusState, EventBus};
use crate::telemetry::Metrics;

/// A separate connection, opened on first use.
#[derive(Debug)]
pub(crate) struct SharedConnection(NatsBus);

/// An open connection. It reconnects by itself after every outage.
#[derive(Debug, Clone)]
pub(crate) struct CommandConnection(Arc<Connection>);

/// The state of a connection: up or down, and its session number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LineState {
    pub(crate) up: bool,
    pub(crate) session: u64,
    /// Closed by its owner.
    pub(crate) closed: bool,
}

impl From<Link> for LineState {
    fn from(link: Link) -> Self {
        Self { up: link.up, session: link.sessions, closed: link.closed }
    }
}

/// A watch on the state of a connection.
#[derive(Debug)]
pub(crate) struct ConnectionWatch(watch::Receiver<Link>);

impl ConnectionWatch {
    /// Waits until `condition` holds. Cancel-safe.
    pub(crate) async fn until(&mut self, condition: impl Fn(LineState) -> bool) -> LineState {
        match self.0.wait_for(|link| condition((*link).into())).await {
            Ok(link) => (*link).into(),
            Err(_) => LineState { up: false, session: 0, closed: true },
        }
    }
}

impl SharedConnection {
    /// Creates a connection. `metrics` applies unless the options have their own.
    pub(crate) fn new(mut options: NatsOptions, metrics: Metrics) -> Self {
        options.metrics.get_or_insert(metrics);
        Self(NatsBus::new(options, "commands"))
    }

    /// Connects, unless connected already.
    pub(crate) async fn open(&self) -> Result<CommandConnection, BusError> {
        Ok(CommandConnection(self.0.connection().await?))
    }

    /// The last asynchronous error of the server.
    pub(crate) fn last_error(&self) -> Option<String> {
        match self.0.state() {
            BusState::Connected { last_error, .. } => last_error,
            _ => None,
        }
    }

    pub(crate) async fn close(&self) {
        self.0.disconnect().await;
    }
}

impl CommandConnection {
    pub(crate) fn client(&self) -> &Client {
        &self.0.client
    }

    /// Checks that the connection is up. While down, a message would be queued and sent later.
    pub(crate) fn check(&self) -> Result<(), BusError> {
        self.0.check()
    }

    pub(crate) fn watch(&self) -> ConnectionWatch {
        ConnectionWatch(self.0.link())
    }

    /// Waits until the server has everything sent before.
    /// Fails if the server refused one of `subjects` after error number `since`.
    pub(crate) async fn confirm(&self, what: &str, since: u64, subjects: &[String]) -> Result<(), BusError> {
        let client = &self.0.client;
        let echoed = async { Echo::new(client).await?.round_trip(client).await };
        self.0.ask_permitted(what, subjects, echoed).await?;
        self.0.check_refusals(what, subjects, since).await
    }

    /// Number of errors that the server has reported asynchronously.
    pub(crate) fn errors(&self) -> u64 {
        self.0.errors()
    }

    /// Waits until the server refuses `subject`, after error number `since`. Cancel-safe.
    pub(crate) async fn refused(&self, what: &str, since: u64, subject: &str) -> BusError {
        self.0.refused(what, since, &[subject.to_owned()]).await
    }
}
