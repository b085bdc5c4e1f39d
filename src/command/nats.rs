//! Commands between nodes, over NATS Core.
//!
//! Every node has its own subject and announces once a second which commands it handles. Rendezvous
//! hashing of the aggregate's id gives the same order of candidates on every node. A command goes
//! to the first live candidate. If that node has left, refuses the command or is silent, the
//! command goes to the next one. Ownership is affinity only: the store ensures that a command takes
//! effect once. `docs/wire-format.md` describes the frames.

mod clocks;
mod cluster_link;
mod membership;
mod options;
mod peer_table;
mod pending_replies;
mod remote_dispatch;
mod server;
mod shared;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use uuid::Uuid;

use self::clocks::PeerClocks;
use self::cluster_link::ClusterLink;
use self::membership::run;
pub use self::options::NatsCommandOptions;
use self::peer_table::PeerTable;
use self::pending_replies::PendingReplies;
use self::remote_dispatch::RemoteDispatch;
use self::shared::{Shared, Subjects};
use super::bus::CommandBusStatus;
use super::envelope::Deadline;
use super::hooks::CommandHooks;
use super::registry::Registry;
use super::route::Route;
use super::wire::{Code, CommandFrame, Failure, Kind, Outcome};
use crate::bus::SharedConnection;
use crate::future::BoxFuture;
use crate::supervised::Task;
use crate::telemetry::Metrics;

/// Time that a command waits for a permit within the limit of commands to other nodes.
const ADMISSION: Duration = Duration::from_secs(1);

/// Time that a starting runtime waits for the presence of other nodes.
const FIRST_CONTACT: Duration = Duration::from_secs(2);

/// The membership of this node in the command bus.
pub(crate) struct NatsNode {
    shared: Arc<Shared>,
    connection: Arc<SharedConnection>,
    in_flight: Arc<Semaphore>,
    _run: Task,
}

impl NatsNode {
    /// Joins the other nodes. If the server is down, it retries in the background without limit.
    pub(super) async fn start(
        options: NatsCommandOptions,
        registry: Weak<Registry>,
        hooks: CommandHooks,
        metrics: Metrics,
        store: Uuid,
        incarnation: Uuid,
    ) -> Self {
        let NatsCommandOptions { options, node, beat, in_flight: limit } = options;
        let shared = Arc::new(Shared {
            registry,
            hooks,
            subjects: Subjects { namespace: options.namespace.clone() },
            incarnation,
            store,
            name: node.unwrap_or_else(|| incarnation.to_string()),
            beat,
            table: PeerTable::new(),
            clocks: PeerClocks::default(),
            started: Instant::now(),
            calls: PendingReplies::new(),
            permits: Arc::new(Semaphore::new(limit)),
            limit,
            link: watch::Sender::new(ClusterLink::Down { reason: "not connected to NATS yet".into() }),
            draining: watch::Sender::new(false),
            ended: AtomicBool::new(false),
        });
        let connection = Arc::new(SharedConnection::new(options, metrics));
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
    pub(super) fn route(&self, kind: Kind, name: &str, spread: &str, able: bool) -> Result<Route, String> {
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
        let permit = tokio::time::timeout(ADMISSION, self.in_flight.clone().acquire_owned());
        let Ok(Ok(permit)) = permit.await else { return Err(overloaded()) };
        let ack_on_accept = frame.prompt;
        let attempts = RemoteDispatch::new(self.shared.clone(), frame, assign, deadline, permit);
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
            async { tokio::join!(self.shared.permits.acquire_many(all), self.in_flight.acquire_many(all)) };
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
