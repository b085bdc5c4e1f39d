//! The bus over NATS: Core (keeps nothing) or JetStream (keeps an exact copy of the log).
//!
//! Both drivers publish every event to `{namespace}.events.{event name}`, in log order. Followers
//! use a plain subscription with both drivers, unless they
//! [follow durably](crate::projection::FollowMode). A durable consumer is slower and no safer: a
//! live follower detects gaps by the positions in the messages. It then reads the missing events
//! from the store. `docs/wire-format.md` describes the message format.

mod connection;
mod connection_metrics;
mod consumer_name;
mod core_nats;
mod durable_consumer;
mod inspect;
mod jetstream;
mod limits;
mod live_subscription;
mod merged_subscription;
mod options;
pub(crate) mod shared_connection;
mod subjects;
mod subscribe;
mod wakeup;
mod wire;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_nats::Client;
use tokio::sync::{Mutex, watch};
use uuid::Uuid;

pub use self::connection::NatsEvent;
use self::connection::{Connection, Watch};
use self::connection_metrics::Recorder;
use self::core_nats::CorePublisher;
use self::durable_consumer::NatsFollower;
pub use self::inspect::{
    ConsumerReport, Field, LogStreamItem, LogStreamReader, NatsReport, StreamFound, StreamReport,
};
use self::jetstream::LogPublisher;
pub use self::jetstream::{
    AckError, ConsumerPolicy, JetStreamOptions, LogStreamFrom, StreamPolicy, StreamStorage,
};
use self::live_subscription::NatsSubscription;
pub use self::options::NatsOptions;
use self::subjects::Names;
pub use self::subjects::{InvalidPattern, Subjects};
pub use self::subscribe::{
    CloseError, ConsumerOptions, Delivery, Gap, HandleError, HandleOptions, HandlerTask, Received,
    RetryPolicy, StartFrom, SubscribeOptions, Subscription, SubscriptionError, SubscriptionErrors,
    SubscriptionStats,
};
use self::wire::Wire;
use super::{
    BusError, BusPublisher, BusScope, BusState, BusSubscription, DurableSubscription, EventBus, Follow,
};
use crate::future::BoxFuture;
use crate::telemetry::Metrics;
#[cfg(feature = "otel")]
use crate::telemetry::Telemetry;

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
    inner: Arc<Inner>,
}

struct Inner {
    options: NatsOptions,
    names: Names,
    /// Destination of events for metrics: the name of the stream, or the namespace.
    place: String,
    slot: Mutex<Slot>,
    state: watch::Sender<BusState>,
    /// Purpose of the connection, for metrics.
    role: &'static str,
    metrics: Recorder,
}

/// State of the connection.
enum Slot {
    /// No connection yet, or the last attempt failed.
    Empty,
    Open(Arc<Connection>),
    /// Closed by the owner. Only [`NatsBus::connect`] opens a new connection.
    Closed,
}

/// The NATS driver.
#[derive(Debug, Clone)]
enum Driver {
    Core,
    JetStream(JetStreamOptions),
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

    fn new(options: NatsOptions, role: &'static str) -> Self {
        let state = watch::Sender::new(BusState::Idle);
        let names = options.names();
        let metrics = Recorder::new(options.metrics.clone());
        let place = match &options.driver {
            Driver::JetStream(options) => options.name(names.namespace()),
            Driver::Core => names.namespace().to_owned(),
        };
        let slot = Mutex::new(Slot::Empty);
        Self { inner: Arc::new(Inner { options, names, place, slot, state, role, metrics }) }
    }

    /// The destination of metrics.
    fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    fn place(&self) -> &str {
        &self.inner.place
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

    fn names(&self) -> &Names {
        &self.inner.names
    }

    /// The name and the options of the log stream.
    fn stream_of(&self) -> Result<(String, &JetStreamOptions), BusError> {
        match &self.inner.options.driver {
            Driver::JetStream(options) => Ok((options.name(self.names().namespace()), options)),
            Driver::Core => Err(BusError::Incompatible { reason: "NATS Core keeps no stream".into() }),
        }
    }

    async fn connection(&self) -> Result<Arc<Connection>, BusError> {
        self.inner.open(&mut *self.inner.slot.lock().await).await
    }
}

impl Inner {
    /// Checks options that no connection could work with.
    fn check(&self) -> Result<(), BusError> {
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

impl EventBus for NatsBus {
    fn name(&self) -> &'static str {
        match self.inner.options.driver {
            Driver::Core => "nats-core",
            Driver::JetStream(_) => "nats-jetstream",
        }
    }

    fn check(&self) -> Result<(), BusError> {
        self.inner.check()
    }

    fn destination(&self) -> Cow<'static, str> {
        self.place().to_owned().into()
    }

    #[cfg(feature = "otel")]
    fn observe(&self, telemetry: &Telemetry) {
        self.inner.metrics.tell(telemetry);
    }

    fn scope(&self) -> BusScope {
        BusScope::Shared
    }

    fn state(&self) -> BusState {
        self.inner.state.borrow().clone()
    }

    fn publisher(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusPublisher>, BusError>> {
        Box::pin(async move {
            let connection = self.connection().await?;
            let names = &self.inner.names;
            Ok(match &self.inner.options.driver {
                Driver::Core => Box::new(CorePublisher::new(connection, names, store).await?) as _,
                Driver::JetStream(options) => {
                    Box::new(LogPublisher::new(connection, names, store, options.clone())) as _
                }
            })
        })
    }

    fn hint(&self, store: Uuid) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(async move {
            let connection = self.connection().await?;
            connection.check()?;
            wakeup::hint(&connection.client, &Wire::new(self.names(), store)).await
        })
    }

    fn subscribe(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusSubscription>, BusError>> {
        Box::pin(async move {
            let connection = self.connection().await?;
            let names = &self.inner.names;
            Ok(Box::new(NatsSubscription::new(connection, names, store).await?) as _)
        })
    }

    fn is_durable(&self) -> bool {
        matches!(self.inner.options.driver, Driver::JetStream(_))
    }

    fn follow(&self, follow: Follow) -> Result<Box<dyn DurableSubscription>, BusError> {
        self.stream_of()?;
        Ok(Box::new(NatsFollower::start(self.clone(), follow)?))
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
