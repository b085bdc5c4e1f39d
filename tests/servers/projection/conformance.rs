//! Conformance suite of projections on every combination of store and bus.
//!
//! The read model matches the store: a table of SQLite or PostgreSQL, or, for the store in memory,
//! an external system that deduplicates by its key.
//!
//! Durable following exists on JetStream only: without a bus and over Core, a runtime with this
//! option does not start (`tests/servers/bus/durable.rs`).

mod failing;
mod following;
mod operating;
pub mod place;
mod sharing;
mod status;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use storied::bus::{JetStreamOptions, NatsOptions};
use storied::projection::{BuildTarget, FollowMode, PerTarget};
use storied::testing::Node;
use storied::{
    EventBus, EventSet, EventStore, FeedOptions, Filter, Partition, Position, ProjectionHandle,
    ProjectionOptions, PublisherOptions, ReadLog,
};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;
use uuid::Uuid;

use self::place::{InPostgres, InSqlite, Outside, Place, Writes};
use crate::projection::fixtures::{self, Hook, PATIENCE};
use crate::support::{self, NatsServer};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bus {
    None,
    Core,
    JetStream,
    Durable,
}

/// Resources of one test case: a log, a database for read models, a namespace on the bus.
struct Scene<P> {
    store: Arc<dyn EventStore>,
    place: P,
    bus: Bus,
    server: Arc<Option<Mutex<NatsServer>>>,
    url: String,
    namespace: String,
}

impl<P: Place> Scene<P> {
    async fn node(&self) -> Node {
        let quick = |options: NatsOptions| -> Option<Arc<dyn EventBus>> {
            let options = options.url(&self.url).namespace(&self.namespace);
            let options = options.reconnect_wait(Duration::from_millis(50));
            Some(Arc::new(options.ping_interval(Duration::from_millis(300)).bus()))
        };
        let bus = match self.bus {
            Bus::None => None,
            Bus::Core => quick(NatsOptions::core()),
            Bus::JetStream | Bus::Durable => {
                quick(NatsOptions::jetstream(JetStreamOptions::new().max_bytes(20 << 20)))
            }
        };
        let feed = FeedOptions::new().idle_poll(Duration::from_millis(250));
        let publishing =
            PublisherOptions::new().heartbeat(Duration::from_millis(100)).lease_ttl(Duration::from_secs(1));
        Node::start(self.store.clone(), bus, feed, publishing).await
    }

    fn options(&self) -> ProjectionOptions {
        let durable = self.bus == Bus::Durable;
        fixtures::options().follow(if durable { FollowMode::Durable } else { FollowMode::Feed })
    }

    fn writes(&self, name: &str) -> Writes<P> {
        Writes::new(self.place.clone(), name)
    }

    /// Starts a projection of the node.
    async fn start<E: EventSet>(
        &self,
        node: &Node,
        writes: Writes<P, E>,
        options: ProjectionOptions,
    ) -> ProjectionHandle {
        node.projection(writes, self.place.model().await, options).await
    }

    /// Starts a projection with versions and, if requested, partitions, which all run the same
    /// hook.
    async fn start_made(
        &self,
        node: &Node,
        name: &'static str,
        partitions: Option<u16>,
        hook: Hook,
        options: ProjectionOptions,
    ) -> ProjectionHandle {
        let place = self.place.clone();
        let make = move |target: BuildTarget| {
            Writes::new(place.clone(), name).version(target.version).hook(hook.clone())
        };
        let model = self.place.model().await;
        match partitions {
            None => node.projection(PerTarget::new(make), model, options).await,
            Some(count) => node.projection(PerTarget::new(make), model, options.partitions(count)).await,
        }
    }

    async fn append(&self, stream: u64, numbers: impl IntoIterator<Item = u64>) -> Position {
        fixtures::append(&self.store, stream, numbers).await
    }

    async fn head(&self) -> Position {
        self.store.high_water_mark().await.unwrap()
    }

    /// The read model must equal the log for the filter, in order.
    async fn assert_exact(&self, name: &str, filter: &Filter) {
        assert_eq!(self.place.seen(name).await, fixtures::log(&self.store, filter).await, "{name}");
    }

    /// The same for each partition.
    async fn assert_partitions_exact(&self, name: &str, partitions: u16) {
        let (seen, mut log) = (self.place.seen(name).await, Vec::new());
        let mut after = Position::START;
        loop {
            let page = self.store.read_log(ReadLog::after(after)).await.unwrap();
            log.extend(page.events.iter().map(|event| (event.stream.clone(), event.position)));
            after = page.scanned_to;
            if !page.has_more() {
                break;
            }
        }
        assert_eq!(seen.len(), log.len(), "{name}");
        for partition in 0..partitions {
            let here = |stream| Partition::of(stream, partitions).index() == partition;
            let here: Vec<_> = log.iter().filter(|(stream, _)| here(stream)).map(|(_, at)| *at).collect();
            let found: Vec<_> = seen.iter().copied().filter(|at| here.binary_search(at).is_ok()).collect();
            assert_eq!(found, here, "{name}: {partition}");
        }
    }
}

/// Number of test cases of one combination that run concurrently.
const SIDE_BY_SIDE: usize = 5;

/// Permits of the test cases of all combinations: two processors serve more of them too slowly.
static RUNNING: Semaphore = Semaphore::const_new(8);

async fn all<P: Place>(bus: Bus) {
    let (server, url) = match bus {
        Bus::None => (None, String::new()),
        _ => {
            let server = NatsServer::start(support::NatsOptions::jetstream()).await;
            let url = server.url();
            (Some(Mutex::new(server)), url)
        }
    };
    let server = Arc::new(server);
    let scene = || async {
        let (store, place) = P::open().await;
        let namespace = format!("ns{}", Uuid::new_v4().simple());
        Scene { store, place, bus, server: server.clone(), url: url.clone(), namespace }
    };
    let mut cases: Vec<(&str, BoxFuture<'static, ()>)> = Vec::new();
    macro_rules! cases {
        ($($module:ident::$case:ident),* $(,)?) => {
            $(cases.push((stringify!($case), Box::pin($module::$case(scene().await))));)*
        };
    }
    cases![
        following::catches_up_and_follows,
        following::is_handed_over_under_load,
        following::reaches_the_head_for_a_filter_without_matches,
        following::resumes_from_its_checkpoint,
        failing::stops_before_a_poison_event,
        failing::parks_retries_and_discards,
        failing::skips_unknown_names,
        failing::does_not_affect_other_projections,
        operating::applies_nothing_while_paused,
        operating::replays_after_a_reset,
        operating::is_rebuilt_beside_the_live_one,
        operating::a_rebuild_can_be_cancelled,
        operating::applies_up_to_the_trigger_target,
        operating::applies_up_to_the_trigger_target_in_partitions,
        sharing::one_of_two_nodes_owns_it,
        sharing::nodes_share_its_partitions,
        status::reports_its_lag,
    ];
    let mut running = tokio::task::JoinSet::new();
    for (name, case) in cases {
        if running.len() >= SIDE_BY_SIDE {
            ended(running.join_next().await);
        }
        running.spawn(run(name, case));
    }
    while !running.is_empty() {
        ended(running.join_next().await);
    }
    // Last and alone: no other case uses the bus meanwhile.
    if server.is_some() {
        let (name, case) = ("survives_a_bus_outage", following::survives_a_bus_outage(scene().await));
        run(name, Box::pin(case)).await;
    }
}

async fn run(name: &'static str, case: impl Future<Output = ()>) {
    let _permit = RUNNING.acquire().await.unwrap();
    let began = tokio::time::Instant::now();
    if timeout(3 * PATIENCE, case).await.is_err() {
        panic!("{name} takes too long");
    }
    println!("{name}: {:?}", began.elapsed());
}

fn ended(case: Option<Result<(), tokio::task::JoinError>>) {
    if let Some(Err(error)) = case {
        std::panic::resume_unwind(error.into_panic());
    }
}

macro_rules! combinations {
    ($($name:ident: $place:ty, $bus:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                all::<$place>(Bus::$bus).await;
            }
        )*
    };
}

combinations! {
    memory_without_a_bus: Outside, None;
    memory_over_core: Outside, Core;
    memory_over_jetstream: Outside, JetStream;
    memory_over_jetstream_durably: Outside, Durable;
    sqlite_without_a_bus: InSqlite, None;
    sqlite_over_core: InSqlite, Core;
    sqlite_over_jetstream: InSqlite, JetStream;
    sqlite_over_jetstream_durably: InSqlite, Durable;
    postgres_without_a_bus: InPostgres, None;
    postgres_over_core: InPostgres, Core;
    postgres_over_jetstream: InPostgres, JetStream;
    postgres_over_jetstream_durably: InPostgres, Durable;
}
