//! Commands between nodes, over NATS Core.
//!
//! Every node has a subject of its own and says once a second what it handles. A command goes to the first live candidate
//! in an order that every node computes alike from the aggregate's id (rendezvous hashing), and to the next ones when that
//! one is gone, refuses or falls silent. Ownership is affinity only: that a command takes effect once is the business of
//! the store. The frames are described in `docs/wire-format.md`.

mod attempts;
mod calls;
mod clocks;
mod link;
mod presence;
mod serve;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use uuid::Uuid;

use self::attempts::Attempts;
use self::calls::Calls;
use self::clocks::PeerClocks;
use self::link::{Link, run};
use self::presence::Table;
use super::bus::{CommandBus, CommandBusStatus, Commands, Way};
use super::envelope::Deadline;
use super::wire::{Code, CommandFrame, Failure, Kind, Outcome};
use crate::bus::{BusError, Line, NatsOptions};
use crate::future::BoxFuture;
use crate::invalid_option::{InvalidOption, within};
use crate::supervised::Task;

/// How long a command waits for a place among those that this node has sent.
const ADMISSION: Duration = Duration::from_secs(1);

/// How long a runtime that starts waits to hear of other nodes.
const FIRST_CONTACT: Duration = Duration::from_secs(2);

/// How commands travel over NATS. Made from a URL, or from [`NatsOptions`] for logins, TLS and the namespace; what these say
/// about events and streams is of no concern here.
///
/// ```
/// use std::time::Duration;
/// use storied::NatsOptions;
/// use storied::command::{CommandBus, NatsCommands};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let options = NatsOptions::core().url("nats://nats-1:4222,nats://nats-2:4222").namespace("shop")?;
/// let bus = CommandBus::nats(NatsCommands::new(options).node("shop-1"));
/// # let _ = bus;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct NatsCommands {
    options: NatsOptions,
    node: Option<String>,
    beat: Duration,
    in_flight: usize,
}

impl NatsCommands {
    /// Connects as `options` say.
    #[must_use]
    pub fn new(options: NatsOptions) -> Self {
        Self { options, node: None, beat: Duration::from_secs(1), in_flight: 4_096 }
    }

    /// What this node is called. A node that comes back under its name owns what it owned before. A new name with every
    /// start by default. Of two nodes with one name the one that was started later counts. 1 to 200 characters, checked when
    /// the runtime starts.
    #[must_use]
    pub fn node(mut self, name: impl Into<String>) -> Self {
        self.node = Some(name.into());
        self
    }

    /// How often a node says that it is there, and that it is still at work on a command. Whoever is silent for three and a
    /// half times as long counts as lost. A command of another node waits no longer than this for a place in a full aggregate or
    /// handler. The same on all nodes. Default: 1 s. Range: 10 ms to 1 h.
    #[must_use]
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.beat = every;
        self
    }

    /// How many commands of this node may be under way to others, and how many of others here. Further ones wait for a second
    /// and are answered `Overloaded`; those of others go to the next node at once. Default: 4,096. Range: 1 to 1,048,576.
    #[must_use]
    pub fn max_in_flight(mut self, commands: usize) -> Self {
        self.in_flight = commands;
        self
    }

    /// Refuses options out of their range.
    pub(super) fn validate(&self) -> Result<(), InvalidOption> {
        let beat = Duration::from_millis(10)..=Duration::from_secs(3_600);
        within("NatsCommands::heartbeat", self.beat, beat)?;
        within("NatsCommands::max_in_flight", self.in_flight, 1..=1 << 20)
    }

    /// Refuses options that no connection could work with.
    pub(super) fn check(&self) -> Result<(), BusError> {
        self.options.check()?;
        match &self.node {
            Some(name)
                if name.trim().is_empty()
                    || name.chars().count() > 200
                    || name.contains(char::is_control) =>
            {
                let shown: String = name.chars().take(80).collect();
                let reason =
                    format!("{shown:?} cannot be the name of a node: use 1 to 200 printable characters");
                Err(BusError::Incompatible { reason })
            }
            _ => Ok(()),
        }
    }
}

impl From<NatsOptions> for NatsCommands {
    fn from(options: NatsOptions) -> Self {
        Self::new(options)
    }
}

impl From<&str> for NatsCommands {
    fn from(url: &str) -> Self {
        Self::new(NatsOptions::core().url(url))
    }
}

impl From<String> for NatsCommands {
    fn from(url: String) -> Self {
        Self::new(NatsOptions::core().url(url))
    }
}

impl CommandBus {
    /// Commands reach every node that is connected to the same NATS servers, has the same namespace, and the same event
    /// store. Takes a URL or [`NatsCommands`].
    ///
    /// While NATS is away, commands that this node can execute itself are executed here; others fail at once with
    /// `Unavailable`, and are not kept. Deadlines travel as the time that is left, so the nodes' clocks may differ.
    #[must_use]
    pub fn nats(options: impl Into<NatsCommands>) -> Self {
        Self { nats: Some(options.into()), ..Self::local() }
    }
}

/// A node among others.
pub(crate) struct NatsNode {
    shared: Arc<Shared>,
    line: Arc<Line>,
    in_flight: Arc<Semaphore>,
    _run: Task,
}

/// What everything that runs on behalf of the node shares.
struct Shared {
    commands: Weak<Commands>,
    subjects: Subjects,
    /// Another one with every start.
    incarnation: Uuid,
    store: Uuid,
    /// What the node is called.
    name: String,
    beat: Duration,
    table: Table,
    clocks: PeerClocks,
    /// When this node's clock was 0.
    started: Instant,
    /// The commands of this node that are under way to others.
    calls: Calls,
    /// Places for commands of others, and how many there are.
    places: Arc<Semaphore>,
    limit: usize,
    link: watch::Sender<Link>,
    draining: watch::Sender<bool>,
    /// Nobody answers any more.
    ended: AtomicBool,
}

/// What the subjects are called.
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
    /// How long somebody may be silent.
    fn silence(&self) -> Duration {
        self.beat * 7 / 2
    }

    /// Milliseconds since this node's start.
    fn clock(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl NatsNode {
    /// Joins the others. A server that is away is tried in the background, without end.
    pub(super) async fn start(
        options: NatsCommands,
        commands: Weak<Commands>,
        store: Uuid,
        incarnation: Uuid,
    ) -> Self {
        let NatsCommands { options, node, beat, in_flight: limit } = options;
        let shared = Arc::new(Shared {
            commands,
            subjects: Subjects { namespace: options.namespace.clone() },
            incarnation,
            store,
            name: node.unwrap_or_else(|| incarnation.to_string()),
            beat,
            table: Table::new(),
            clocks: PeerClocks::default(),
            started: Instant::now(),
            calls: Calls::new(),
            places: Arc::new(Semaphore::new(limit)),
            limit,
            link: watch::Sender::new(Link::Down { reason: "it has not been tried yet".into() }),
            draining: watch::Sender::new(false),
            ended: AtomicBool::new(false),
        });
        let metrics = shared.commands.upgrade().map(|commands| commands.metrics().clone());
        let line = Arc::new(Line::new(options, metrics.unwrap_or_default()));
        let task = Task::spawn(run(shared.clone(), line.clone()));
        let mut link = shared.link.subscribe();
        // Commands that come right behind the start find the others, if there is a server at all.
        let settled = link.wait_for(|link| link.is_settled());
        if tokio::time::timeout(FIRST_CONTACT, settled).await.is_err() {
            tracing::warn!(link = ?*shared.link.borrow(), "starting without the other nodes; they are looked for in the background");
        }
        Self { shared, line, in_flight: Arc::new(Semaphore::new(limit)), _run: task }
    }

    pub(super) fn status(&self) -> CommandBusStatus {
        match &*self.shared.link.borrow() {
            Link::Up { .. } => CommandBusStatus::Connected {
                nodes: self.shared.table.names(),
                last_error: self.line.last_error(),
            },
            Link::Down { reason } => CommandBusStatus::Disconnected { reason: reason.clone() },
        }
    }

    /// Where a command goes first; why not anywhere.
    pub(super) fn way(&self, kind: Kind, name: &str, spread: &str, able: bool) -> Result<Way, String> {
        let shared = &self.shared;
        if let Link::Down { reason } = &*shared.link.borrow() {
            return if able { Ok(Way::Here { others: false }) } else { Err(reason.clone()) };
        }
        let own = able.then_some((shared.name.as_str(), shared.incarnation));
        let (owner, candidates) = shared.table.owner(kind, name, spread, own, shared.silence());
        Ok(if owner == Some(shared.incarnation) { Way::Here { others: candidates > 1 } } else { Way::There })
    }

    /// Sends a command to whoever takes it. Answers when somebody has accepted it if the frame asks for that, and goes on
    /// without anybody who waits then; else at once, and the command is sent when the answer is awaited.
    pub(super) async fn send(
        &self,
        frame: CommandFrame,
        assign: Deadline,
        deadline: Deadline,
    ) -> Result<BoxFuture<'static, (Outcome, Duration)>, Failure> {
        let overloaded = || Failure {
            number: self.shared.limit as u64,
            ..Failure::new(Code::Overloaded, "commands under way to other nodes")
        };
        let place = tokio::time::timeout(ADMISSION, self.in_flight.clone().acquire_owned());
        let Ok(Ok(place)) = place.await else { return Err(overloaded()) };
        let prompt = frame.prompt;
        let attempts = Attempts::new(self.shared.clone(), frame, assign, deadline, place);
        if !prompt {
            return Ok(Box::pin(attempts.run()));
        }
        let (accepted, done) = attempts.spawn();
        if let Ok(Err(failure)) = accepted.await {
            return Err(failure);
        }
        Ok(Box::pin(async move {
            done.await.unwrap_or_else(|_| {
                let failure =
                    Failure::new(Code::OutcomeUnknown, "the runtime ended before there was an answer");
                (Outcome::Error(failure), Duration::ZERO)
            })
        }))
    }

    /// Tells the others to send nothing more.
    pub(super) async fn leave(&self) {
        self.shared.draining.send_replace(true);
    }

    /// Ends the connection, after every command of others, and every one to others, has its answer (or at `deadline`) and
    /// all has gone out.
    pub(super) async fn stop(&self, deadline: Instant) {
        let all = u32::try_from(self.shared.limit).unwrap_or(u32::MAX);
        let answered =
            async { tokio::join!(self.shared.places.acquire_many(all), self.in_flight.acquire_many(all)) };
        if tokio::time::timeout_at(deadline, answered).await.is_err() {
            tracing::warn!(
                "commands from or to other nodes are still under way: nobody hears what became of them"
            );
        }
        self.shared.ended.store(true, Ordering::Release);
        self.line.close().await;
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
