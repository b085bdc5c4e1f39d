//! The bus over NATS: Core (nothing is kept) or JetStream (an exact mirror of the log).
//!
//! Both publish every event to `{namespace}.events.{event name}`, in log order, and both are followed through a plain
//! subscription, except by those who [follow durably](crate::projection::FollowMode): what comes from JetStream's stream would come later and no more surely, since whoever follows at the tip
//! finds holes by the positions in the messages and reads them from the store anyway. The format of the messages is in
//! `docs/wire-format.md`.

mod connection;
mod core_nats;
mod follow;
mod hints;
mod inspect;
mod jetstream;
mod limits;
pub(crate) mod line;
mod merged;
mod naming;
mod options;
mod recorder;
mod subjects;
mod subscribe;
mod subscription;
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
use self::core_nats::CorePublisher;
use self::follow::NatsFollower;
pub use self::inspect::{
    ConsumerReport, Field, MirrorItem, MirrorReader, NatsReport, StreamFound, StreamReport,
};
use self::jetstream::MirrorPublisher;
pub use self::jetstream::{
    AckError, ConsumerPolicy, JetStreamOptions, MirrorFrom, StreamPolicy, StreamStorage,
};
pub use self::options::NatsOptions;
use self::recorder::Recorder;
use self::subjects::Names;
pub use self::subjects::{InvalidPattern, Subjects};
pub use self::subscribe::{
    CloseError, ConsumerOptions, Delivery, Gap, HandleError, HandleOptions, Handling, Received, RetryPolicy,
    StartFrom, SubscribeOptions, Subscription, SubscriptionError, SubscriptionErrors, SubscriptionStats,
};
use self::subscription::NatsSubscription;
use self::wire::Wire;
use super::{
    BusError, BusPublisher, BusScope, BusState, BusSubscription, DurableSubscription, EventBus, Follow,
};
use crate::future::BoxFuture;
use crate::telemetry::Metrics;
#[cfg(feature = "otel")]
use crate::telemetry::Telemetry;

/// How long [`NatsBus::disconnect`] waits for what is on its way.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The bus over NATS. Clones are handles to the same bus and its one connection.
///
/// It connects when it is first used, and again whenever that failed; once connected it comes back by itself after every
/// outage, without end. Nothing is handed to a connection that is down: publishing fails at once, and goes on from the
/// store later. Needs nats-server 2.10 or newer, checked on every connect.
///
/// Core keeps nothing: who is not there misses it, notices, and reads the store. JetStream keeps an exact mirror of the log
/// in a stream, for programs without access to the store.
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
    /// What events are in, for those who watch: the stream, or the namespace.
    place: String,
    slot: Mutex<Slot>,
    state: watch::Sender<BusState>,
    /// What the connection is for.
    role: &'static str,
    metrics: Recorder,
}

/// Where the connection is.
enum Slot {
    /// Not made yet, or not successfully.
    Empty,
    Open(Arc<Connection>),
    /// Given up by the owner: only [`NatsBus::connect`] makes another.
    Closed,
}

/// What keeps the messages.
#[derive(Debug, Clone)]
enum Driver {
    Core,
    JetStream(JetStreamOptions),
}

impl NatsBus {
    /// A bus that keeps nothing, with everything but the server as it is by default. For more see [`NatsOptions::core`].
    #[must_use]
    pub fn core(url: impl Into<String>) -> Self {
        NatsOptions::core().url(url).bus()
    }

    /// A bus that mirrors the log in JetStream, with everything but the server as it is by default. For more see
    /// [`NatsOptions::jetstream`].
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

    /// Where its metrics go.
    fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    fn place(&self) -> &str {
        &self.inner.place
    }

    /// Connects now instead of at the first use; also after [`disconnect`](Self::disconnect). Nothing happens when there is
    /// a connection.
    ///
    /// # Errors
    /// [`BusError::Unavailable`] when no server could be reached, and trying again may help; [`BusError::Incompatible`] when
    /// the server is too old, refuses the login, or the options cannot be used.
    pub async fn connect(&self) -> Result<(), BusError> {
        let mut slot = self.inner.slot.lock().await;
        if matches!(*slot, Slot::Closed) {
            *slot = Slot::Empty;
        }
        self.inner.open(&mut slot).await.map(drop)
    }

    /// Ends the connection, if it is ours: what was published goes out first (within 5 s), subscriptions end with
    /// [`BusError::Closed`], and so does everything else until [`connect`](Self::connect).
    pub async fn disconnect(&self) {
        let slot = std::mem::replace(&mut *self.inner.slot.lock().await, Slot::Closed);
        if let Slot::Open(connection) = slot {
            connection.close(DISCONNECT_TIMEOUT).await;
        }
        self.inner.state.send_replace(BusState::Closed);
    }

    /// The connection itself, connecting if need be: for requests, key-value buckets, and whatever else NATS has. It is the
    /// bus's own; do not drain it.
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and [`BusError::Closed`] after [`disconnect`](Self::disconnect).
    pub async fn client(&self) -> Result<Client, BusError> {
        Ok(self.connection().await?.client.clone())
    }

    /// How the connection is doing, now and whenever that changes.
    #[must_use]
    pub fn watch_state(&self) -> watch::Receiver<BusState> {
        self.inner.state.subscribe()
    }

    fn names(&self) -> &Names {
        &self.inner.names
    }

    /// The stream that keeps the log, and what is said about it.
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
    /// Refuses options that no connection could work with.
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
                    Box::new(MirrorPublisher::new(connection, names, store, options.clone())) as _
                }
            })
        })
    }

    fn hint(&self, store: Uuid) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(async move {
            let connection = self.connection().await?;
            connection.check()?;
            hints::hint(&connection.client, &Wire::new(self.names(), store)).await
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
