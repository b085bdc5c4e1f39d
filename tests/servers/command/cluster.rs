//! Nodes over one store, in one process.

use std::sync::Arc;
use std::time::Duration;

use storied::command::{CommandBus, HandlerOptions, NatsCommandOptions};
use storied::runtime::Builder;
use storied::store::ReadLog;
use storied::{EventStore, MemoryStore, NatsOptions, Position, RecordedEvent, Runtime};

use crate::command::domain::{Counter, Shared, Worker};
use crate::support::{self, NatsServer};
pub use crate::support::{PATIENCE, eventually};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One runtime sends and executes commands.
    Local,
    /// One runtime sends commands, and two others execute them.
    Nats,
}

pub const BEAT: Duration = Duration::from_millis(200);

/// Creates a command bus with short intervals, so that tests are fast.
pub fn nats(server: &NatsServer, name: &str) -> CommandBus {
    CommandBus::nats(nats_commands(&server.url(), name))
}

pub fn nats_commands(url: &str, name: &str) -> NatsCommandOptions {
    let options = NatsOptions::core()
        .url(url)
        .reconnect_wait(Duration::from_millis(100))
        .ping_interval(Duration::from_millis(300))
        .answer_timeout(Duration::from_secs(1));
    NatsCommandOptions::new(options).node(name).heartbeat(BEAT)
}

pub async fn server() -> NatsServer {
    NatsServer::start(support::NatsOptions::default()).await
}

/// The caller of commands and the nodes that execute them.
pub struct Cluster {
    pub caller: Runtime,
    /// Executing nodes. Empty if the caller executes the commands.
    pub workers: Vec<Runtime>,
    pub store: MemoryStore,
    pub shared: Arc<Shared>,
    pub server: Option<NatsServer>,
}

pub struct Setup {
    kind: Kind,
    options: HandlerOptions,
    bus: Box<dyn Fn(CommandBus, usize) -> CommandBus + Send + Sync>,
    more: Box<dyn Fn(Builder) -> Builder + Send + Sync>,
}

impl Setup {
    pub fn new(kind: Kind) -> Self {
        let options = HandlerOptions::new().workers(16);
        Self { kind, options, bus: Box::new(|bus, _| bus), more: Box::new(|builder| builder) }
    }

    pub fn options(mut self, options: HandlerOptions) -> Self {
        self.options = options;
        self
    }

    /// Further options of the command buses of executing nodes, by node number.
    pub fn bus(mut self, bus: impl Fn(CommandBus, usize) -> CommandBus + Send + Sync + 'static) -> Self {
        self.bus = Box::new(bus);
        self
    }

    /// Further options of the caller's runtime.
    pub fn caller(mut self, more: impl Fn(Builder) -> Builder + Send + Sync + 'static) -> Self {
        self.more = Box::new(more);
        self
    }

    pub async fn start(self) -> Cluster {
        let Self { kind, options, bus, more } = self;
        let (store, shared) = (MemoryStore::new(), Arc::new(Shared::default()));
        let working = |builder: Builder| {
            builder.aggregate::<Counter>().handler_with(Worker(shared.clone()), options.clone())
        };
        match kind {
            Kind::Local => {
                let bus = bus(CommandBus::local(), 0);
                let builder = Runtime::builder().store(store.clone()).commands(bus);
                let caller = more(working(builder)).start().await.unwrap();
                Cluster { caller, workers: Vec::new(), store, shared, server: None }
            }
            Kind::Nats => {
                let server = server().await;
                let mut workers = Vec::new();
                for number in 0..2 {
                    let bus = bus(nats(&server, &format!("worker-{number}")), number);
                    let builder = Runtime::builder().store(store.clone()).commands(bus);
                    workers.push(working(builder).start().await.unwrap());
                }
                let builder = Runtime::builder().store(store.clone()).commands(nats(&server, "caller"));
                let caller = more(builder).start().await.unwrap();
                Cluster { caller, workers, store, shared, server: Some(server) }
            }
        }
    }
}

impl Cluster {
    pub async fn events(&self) -> Vec<RecordedEvent> {
        self.store.read_log(ReadLog::after(Position::START)).await.unwrap().events
    }

    pub fn seen(&self) -> Vec<u64> {
        self.shared.seen.lock().unwrap().clone()
    }

    pub fn open(&self) {
        self.shared.open.send_replace(true);
    }

    pub async fn stop(self) {
        self.caller.shutdown().await.unwrap();
        for worker in self.workers {
            worker.shutdown().await.unwrap();
        }
    }
}
