//! Commands between nodes, over NATS Core.
//!
//! Every node has its own subject and announces once a second which commands it handles. Rendezvous
//! hashing of the aggregate's id gives the same order of candidates on every node. A command goes
//! to the first live candidate. If that node has left, refuses the command or is silent, the
//! command goes to the next one. Ownership is affinity only: the store ensures that a command takes
//! effect once. `docs/wire-format.md` describes the frames.

mod clocks;
mod membership;
mod peer_table;
mod pending_replies;
mod remote_dispatch;
mod server;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use uuid::Uuid;

use self::clocks::PeerClocks;
use self::membership::{ClusterLink, run};
use self::peer_table::PeerTable;
use self::pending_replies::PendingReplies;
use self::remote_dispatch::RemoteDispatch;
use super::bus::{CommandBus, CommandBusStatus, Dispatcher, Route};
use super::envelope::Deadline;
use super::wire::{Code, CommandFrame, Failure, Kind, Outcome};
use crate::bus::{BusError, NatsOptions, SharedConnection};
use crate::future::BoxFuture;
use crate::invalid_option::{InvalidOption, within};
use crate::supervised::Task;

/// Time that a command waits for a permit within the limit of commands to other nodes.
const ADMISSION: Duration = Duration::from_secs(1);

/// Time that a starting runtime waits for the presence of other nodes.
const FIRST_CONTACT: Duration = Duration::from_secs(2);

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
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let options = NatsOptions::core().url("nats://nats-1:4222,nats://nats-2:4222").namespace("shop")?;
/// let bus = CommandBus::nats(NatsCommandOptions::new(options).node("shop-1"));
/// # let _ = bus;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct NatsCommandOptions {
    options: NatsOptions,
    node: Option<String>,
    beat: Duration,
    in_flight: usize,
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
    pub(super) fn validate(&self) -> Result<(), InvalidOption> {
        let beat = Duration::from_millis(10)..=Duration::from_secs(3_600);
        within("NatsCommandOptions::heartbeat", self.beat, beat)?;
        within("NatsCommandOptions::max_in_flight", self.in_flight, 1..=1 << 20)
    }

    /// Rejects options with which no connection can work.
    pub(super) fn check(&self) -> Result<(), BusError> {
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

impl CommandBus {
    /// Creates a bus that reaches all nodes with the same NATS servers, namespace and event store.
    ///
    /// Accepts a URL or [`NatsCommandOptions`]. During an outage of NATS, this node executes the commands
    /// that it handles. Other commands fail at once with `Unavailable` and are not kept. Deadlines
    /// travel as the time left, so the clocks of the nodes may differ.
    #[must_use]
    pub fn nats(options: impl Into<NatsCommandOptions>) -> Self {
        Self { nats: Some(options.into()), ..Self::local() }
    }
}

/// The membership of this node in the command bus.
pub(crate) struct NatsNode {
    shared: Arc<Shared>,
    connection: Arc<SharedConnection>,
    in_flight: Arc<Semaphore>,
    _run: Task,
}

/// The shared state of all tasks of the node.
struct Shared {
    commands: Weak<Dispatcher>,
    subjects: Subjects,
    /// New with every start.
    incarnation: Uuid,
    store: Uuid,
    /// Name of the node.
    name: String,
    beat: Duration,
    table: PeerTable,
    clocks: PeerClocks,
    /// Time at which this node's clock was 0.
    started: Instant,
    /// Commands of this node in flight to other nodes.
    calls: PendingReplies,
    /// Permits for commands of other nodes, and their number.
    places: Arc<Semaphore>,
    limit: usize,
    link: watch::Sender<ClusterLink>,
    draining: watch::Sender<bool>,
    /// Set after the end of the node. No further reply is sent or received.
    ended: AtomicBool,
}

/// The subjects of the command bus.
struct Subjects {
    namespace: String,
}

impl Subjects {
    fn presence(&self) -> String {
        format!("{}.commands.presence", self.namespace)
    }

    fn node(&self, incarnation: Uuid) -> String {
        format!("{}.commands.node.{incarnation}", self.namespace)
    }
}

impl Shared {
    /// Returns the time after which a silent node counts as lost: 3.5 heartbeats.
    fn silence(&self) -> Duration {
        self.beat * 7 / 2
    }

    /// Returns the milliseconds since this node's start.
    fn clock(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl NatsNode {
    /// Joins the other nodes. If the server is down, it retries in the background without limit.
    pub(super) async fn start(
        options: NatsCommandOptions,
        commands: Weak<Dispatcher>,
        store: Uuid,
        incarnation: Uuid,
    ) -> Self {
        let NatsCommandOptions { options, node, beat, in_flight: limit } = options;
        let shared = Arc::new(Shared {
            commands,
            subjects: Subjects { namespace: options.namespace.clone() },
            incarnation,
            store,
            name: node.unwrap_or_else(|| incarnation.to_string()),
            beat,
            table: PeerTable::new(),
            clocks: PeerClocks::default(),
            started: Instant::now(),
            calls: PendingReplies::new(),
            places: Arc::new(Semaphore::new(limit)),
            limit,
            link: watch::Sender::new(ClusterLink::Down { reason: "not connected to NATS yet".into() }),
            draining: watch::Sender::new(false),
            ended: AtomicBool::new(false),
        });
        let metrics = shared.commands.upgrade().map(|commands| commands.metrics().clone());
        let connection = Arc::new(SharedConnection::new(options, metrics.unwrap_or_default()));
        let task = Task::spawn(run(shared.clone(), connection.clone()));
        let mut link = shared.link.subscribe();
        // Wait for the other nodes, so that commands right after the start find them.
        let settled = link.wait_for(|link| link.is_settled());
        if tokio::time::timeout(FIRST_CONTACT, settled).await.is_err() {
            tracing::warn!(link = ?*shared.link.borrow(), "starting without the other nodes; retrying in the background");
        }
        Self { shared, connection, in_flight: Arc::new(Semaphore::new(limit)), _run: task }
    }

    pub(super) fn status(&self) -> CommandBusStatus {
        match &*self.shared.link.borrow() {
            ClusterLink::Up { .. } => CommandBusStatus::Connected {
                nodes: self.shared.table.names(),
                last_error: self.connection.last_error(),
            },
            ClusterLink::Down { reason } => CommandBusStatus::Disconnected { reason: reason.clone() },
        }
    }

    /// Routes a command to its first destination, or returns the reason why there is none.
    pub(super) fn way(&self, kind: Kind, name: &str, spread: &str, able: bool) -> Result<Route, String> {
        let shared = &self.shared;
        if let ClusterLink::Down { reason } = &*shared.link.borrow() {
            return if able { Ok(Route::Local { others: false }) } else { Err(reason.clone()) };
        }
        let own = able.then_some((shared.name.as_str(), shared.incarnation));
        let (owner, candidates) = shared.table.owner(kind, name, spread, own, shared.silence());
        Ok(if owner == Some(shared.incarnation) {
            Route::Local { others: candidates > 1 }
        } else {
            Route::Remote
        })
    }

    /// Sends a command to the nodes that handle it.
    ///
    /// If the frame is ack_on_accept, it returns when a node has accepted the command, which then runs in
    /// a task of its own. Otherwise it returns at once, and polling the inner future sends the
    /// command.
    pub(super) async fn send(
        &self,
        frame: CommandFrame,
        assign: Deadline,
        deadline: Deadline,
    ) -> Result<BoxFuture<'static, (Outcome, Duration)>, Failure> {
        let overloaded = || Failure {
            number: self.shared.limit as u64,
            ..Failure::new(Code::Overloaded, "commands in flight to other nodes")
        };
        let place = tokio::time::timeout(ADMISSION, self.in_flight.clone().acquire_owned());
        let Ok(Ok(place)) = place.await else { return Err(overloaded()) };
        let ack_on_accept = frame.prompt;
        let attempts = RemoteDispatch::new(self.shared.clone(), frame, assign, deadline, place);
        if !ack_on_accept {
            return Ok(Box::pin(attempts.run()));
        }
        let (accepted, done) = attempts.spawn();
        if let Ok(Err(failure)) = accepted.await {
            return Err(failure);
        }
        Ok(Box::pin(async move {
            done.await.unwrap_or_else(|_| {
                let failure =
                    Failure::new(Code::OutcomeUnknown, "the runtime ended before an answer arrived");
                (Outcome::Error(failure), Duration::ZERO)
            })
        }))
    }

    /// Announces to the other nodes that this node accepts no more commands.
    pub(super) async fn leave(&self) {
        self.shared.draining.send_replace(true);
    }

    /// Closes the connection after all commands from and to other nodes are answered and sent.
    ///
    /// At `deadline` it stops waiting.
    pub(super) async fn stop(&self, deadline: Instant) {
        let all = u32::try_from(self.shared.limit).unwrap_or(u32::MAX);
        let answered =
            async { tokio::join!(self.shared.places.acquire_many(all), self.in_flight.acquire_many(all)) };
        if tokio::time::timeout_at(deadline, answered).await.is_err() {
            tracing::warn!("closing connection with unresolved commands from or to other nodes");
        }
        self.shared.ended.store(true, Ordering::Release);
        self.connection.close().await;
    }
}

impl Drop for NatsNode {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
    }
}

impl fmt::Debug for NatsNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsNode")
            .field("name", &self.shared.name)
            .field("link", &*self.shared.link.borrow())
            .finish_non_exhaustive()
    }
}
