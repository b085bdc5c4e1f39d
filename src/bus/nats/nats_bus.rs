//! A bus over NATS and its connection, opened on first use.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_nats::Client;
use tokio::sync::{Mutex, watch};

use super::connection::Connection;
use super::connection_metrics::{Recorder, Watch};
use super::jetstream::JetStreamOptions;
use super::options::{Driver, NatsOptions};
use super::subjects::Names;
use crate::bus::{BusError, BusState};
use crate::telemetry::Metrics;

/// Time limit of [`NatsBus::disconnect`] for sending pending messages.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The event bus over NATS. Clones are handles to the same bus and its one connection.
///
/// The bus connects on first use and retries a failed connect on the next use. Once connected, it
/// reconnects after every outage, without a limit. It queues nothing while disconnected: publishing
/// fails at once and continues from the store later. Requires nats-server 2.10 or newer, checked on
/// every connect.
///
/// Core keeps nothing: a subscriber that was disconnected detects the gap and reads the store.
/// JetStream keeps an exact copy of the log in a stream (the log stream), for programs without
/// access to the store.
///
/// ```no_run
/// use storied::bus::NatsBus;
/// use storied::{MemoryStore, Runtime};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let runtime = Runtime::builder()
///     .store(MemoryStore::new())
///     .bus(NatsBus::core("nats://127.0.0.1:4222"))
///     .start()
///     .await?;
/// # runtime.shutdown().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct NatsBus {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) options: NatsOptions,
    pub(super) names: Names,
    /// Destination of events for metrics: the name of the stream, or the namespace.
    destination_name: String,
    slot: Mutex<Slot>,
    pub(super) state: watch::Sender<BusState>,
    /// Purpose of the connection, for metrics.
    role: &'static str,
    pub(super) metrics: Recorder,
}

/// State of the connection.
enum Slot {
    /// No connection yet, or the last attempt failed.
    Empty,
    Open(Arc<Connection>),
    /// Closed by the owner. Only [`NatsBus::connect`] opens a new connection.
    Closed,
}

impl NatsBus {
    /// Creates a Core bus with default options. See [`NatsOptions::core`] for more.
    #[must_use]
    pub fn core(url: impl Into<String>) -> Self {
        NatsOptions::core().url(url).bus()
    }

    /// Creates a JetStream bus with default options. See [`NatsOptions::jetstream`] for more.
    #[must_use]
    pub fn jetstream(url: impl Into<String>) -> Self {
        NatsOptions::jetstream(JetStreamOptions::new()).url(url).bus()
    }

    pub(super) fn new(options: NatsOptions, role: &'static str) -> Self {
        let state = watch::Sender::new(BusState::Idle);
        let names = options.names();
        let metrics = Recorder::new(options.metrics.clone());
        let destination_name = match &options.driver {
            Driver::JetStream(options) => options.name(names.namespace()),
            Driver::Core => names.namespace().to_owned(),
        };
        let slot = Mutex::new(Slot::Empty);
        Self { inner: Arc::new(Inner { options, names, destination_name, slot, state, role, metrics }) }
    }

    /// The destination of metrics.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    pub(super) fn destination_name(&self) -> &str {
        &self.inner.destination_name
    }

    /// Connects now, also after [`disconnect`](Self::disconnect). Does nothing if connected.
    ///
    /// # Errors
    /// [`BusError::Unavailable`] if no server was reached; a retry may help.
    /// [`BusError::Incompatible`] if the server is too old or refuses the login, or if the options
    /// are invalid.
    pub async fn connect(&self) -> Result<(), BusError> {
        let mut slot = self.inner.slot.lock().await;
        if matches!(*slot, Slot::Closed) {
            *slot = Slot::Empty;
        }
        self.inner.open(&mut slot).await.map(drop)
    }

    /// Closes the connection, if the bus owns it.
    ///
    /// Sends published messages first (within 5 s). Subscriptions end with [`BusError::Closed`],
    /// and every other call returns it until [`connect`](Self::connect).
    pub async fn disconnect(&self) {
        let slot = std::mem::replace(&mut *self.inner.slot.lock().await, Slot::Closed);
        if let Slot::Open(connection) = slot {
            connection.close(DISCONNECT_TIMEOUT).await;
        }
        self.inner.state.send_replace(BusState::Closed);
    }

    /// Returns the NATS client, and connects if necessary.
    ///
    /// Use it for requests, key-value buckets and other NATS features. The bus shares this
    /// connection: do not drain it.
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and [`BusError::Closed`] after
    /// [`disconnect`](Self::disconnect).
    pub async fn client(&self) -> Result<Client, BusError> {
        Ok(self.connection().await?.client.clone())
    }

    /// Watches the state of the connection.
    #[must_use]
    pub fn watch_state(&self) -> watch::Receiver<BusState> {
        self.inner.state.subscribe()
    }

    pub(super) fn names(&self) -> &Names {
        &self.inner.names
    }

    /// The name and the options of the log stream.
    pub(super) fn stream_of(&self) -> Result<(String, &JetStreamOptions), BusError> {
        match &self.inner.options.driver {
            Driver::JetStream(options) => Ok((options.name(self.names().namespace()), options)),
            Driver::Core => Err(BusError::Incompatible { reason: "NATS Core keeps no stream".into() }),
        }
    }

    pub(super) async fn connection(&self) -> Result<Arc<Connection>, BusError> {
        self.inner.open(&mut *self.inner.slot.lock().await).await
    }
}

impl NatsOptions {
    /// Creates the bus. It connects on first use.
    #[must_use]
    pub fn bus(self) -> NatsBus {
        NatsBus::new(self, "events")
    }
}

impl Inner {
    /// Checks options that no connection could work with.
    pub(super) fn check(&self) -> Result<(), BusError> {
        self.options.check()?;
        self.names.check()
    }

    async fn open(&self, slot: &mut Slot) -> Result<Arc<Connection>, BusError> {
        match slot {
            Slot::Open(connection) => return Ok(connection.clone()),
            Slot::Closed => return Err(BusError::Closed),
            Slot::Empty => {}
        }
        self.check()?;
        let watch = Watch { role: self.role, metrics: self.metrics.clone() };
        match Connection::open(&self.options, &self.state, watch).await {
            Ok(connection) => {
                let connection = Arc::new(connection);
                *slot = Slot::Open(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                self.state.send_replace(BusState::Disconnected { reason: error.to_string() });
                Err(error)
            }
        }
    }
}

impl fmt::Debug for NatsBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsBus")
            .field("options", &self.inner.options)
            .field("state", &*self.inner.state.borrow())
            .finish()
    }
}
