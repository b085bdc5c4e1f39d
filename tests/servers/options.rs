//! Every option of every type, set to zero, one and its maximum.
//!
//! It works, or is refused with its range.

use std::time::Duration;

use storied::command::{HandleError, HandlerContext, HandlerOptions};
use storied::projection::{ApplyError, InMemory, InMemoryIndex, Schedule};
use storied::runtime::{Builder, StartError};
use storied::{
    AggregateOptions, AnyEvent, ExecuteError, FeedOptions, Handler, MemoryStore, NeverRejects,
    NotExecutedKind, PostgresOptions, Projection, ProjectionOptions, PublisherOptions, RecordedEvent,
    Runtime, SnapshotRevision, SqliteOptions, StoreError,
};
use tokio::time::timeout;

use crate::support::counter::{Add, Counter};

/// Longer than any step takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone)]
struct Echo;

impl Handler for Echo {
    type Command = u64;
    type Reply = u64;
    type Error = NeverRejects;
    const NAME: &'static str = "echo";

    async fn handle(&self, command: &u64, _: &HandlerContext) -> Result<u64, HandleError<NeverRejects>> {
        Ok(*command)
    }
}

struct Nothing;

impl Projection for Nothing {
    const NAME: &'static str = "nothing";
    type Event = AnyEvent;
    type Transaction = ();

    async fn apply(&mut self, _: AnyEvent, _: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
        Ok(())
    }

    async fn reset(&mut self, _: &mut ()) -> Result<(), ApplyError> {
        Ok(())
    }
}

/// The options of one run; the others have their defaults.
#[derive(Default)]
struct Options {
    feed: FeedOptions,
    publisher: PublisherOptions,
    aggregate: AggregateOptions<Counter>,
    handler: HandlerOptions,
    projection: ProjectionOptions,
    snapshots: Option<u64>,
    index_snapshots: Option<u64>,
}

impl Options {
    fn builder(self) -> Builder {
        let index = InMemoryIndex::new("index", |count: &mut u64, _: AnyEvent, _| {
            *count += 1;
            Ok(())
        });
        let index = match self.index_snapshots {
            Some(events) => index.snapshot_every(events, SnapshotRevision(1)),
            None => index,
        };
        let model = match self.snapshots {
            Some(events) => InMemory::new().snapshot_every(
                events,
                SnapshotRevision(1),
                std::sync::Arc::new(std::sync::RwLock::new(0_u64)),
            ),
            None => InMemory::new(),
        };
        Runtime::builder()
            .feed(self.feed)
            .publisher(self.publisher)
            .aggregate_with(self.aggregate)
            .handler_with(Echo, self.handler)
            .projection_with(Nothing, model, self.projection)
            .in_memory_index(&index)
    }
}

/// Runs a small runtime: it starts and works, or its start is refused.
async fn run(builder: Builder) -> Result<(), StartError> {
    let runtime = timeout(PATIENCE, builder.start()).await.unwrap()?;
    let mut position = storied::Position::START;
    for n in 1..=5 {
        // With a limit of 1, the permit is free only a moment after the answer.
        let receipt = loop {
            match runtime.execute::<Counter>("one", Add(1)).await {
                Err(ExecuteError::NotExecuted {
                    kind: NotExecutedKind::Overloaded { limit: 1, .. }, ..
                }) => tokio::task::yield_now().await,
                answer => break answer.unwrap(),
            }
        };
        assert_eq!(receipt.reply, n);
        position = receipt.position;
        assert_eq!(runtime.execute_handler::<Echo>(n).await.unwrap().reply, n);
    }
    let handle = runtime.projection("nothing").unwrap();
    handle.trigger().await.unwrap();
    handle.caught_up_to_within(position, PATIENCE).await.unwrap();
    runtime.shutdown_within(PATIENCE).await.unwrap();
    Ok(())
}

/// Checks that the message names the option, its value and its range.
fn assert_named(error: &str, option: &str) {
    assert!(error.contains(option) && error.contains("value ") && error.contains("allowed: "), "{error}");
}

type Set<T> = fn(Options, T) -> Options;

/// Runs with each value; exactly the values in `refused` must be refused.
async fn try_each<T: Copy + PartialEq + std::fmt::Debug>(
    option: &str,
    set: Set<T>,
    values: &[T],
    refused: &[T],
) {
    for &value in values {
        let builder = set(Options::default(), value).builder().store(MemoryStore::new());
        match run(builder).await {
            Ok(()) => assert!(!refused.contains(&value), "{option} = {value:?} was accepted"),
            Err(StartError::Option(error)) => {
                assert!(refused.contains(&value), "{option} = {value:?}: {error}");
                assert_named(&error.to_string(), option);
            }
            Err(error) => panic!("{option} = {value:?}: {error}"),
        }
    }
}

const ZERO: Duration = Duration::ZERO;
const NANO: Duration = Duration::from_nanos(1);
const TIMES: [Duration; 4] = [ZERO, NANO, Duration::from_secs(1), Duration::MAX];
const COUNTS: [usize; 3] = [0, 1, usize::MAX];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_are_in_their_range_or_refused() {
    let short = &[ZERO, NANO][..];
    let lease = &[ZERO, NANO, Duration::MAX][..];
    let none = &[][..];
    let rows: [(&str, Set<Duration>, &[Duration]); 13] = [
        (
            "HandlerOptions::time_limit",
            |o, v| Options { handler: o.handler.clone().time_limit(v), ..o },
            lease,
        ),
        ("FeedOptions::idle_poll", |o, v| Options { feed: o.feed.clone().idle_poll(v), ..o }, short),
        (
            "PublisherOptions::heartbeat",
            |o, v| Options { publisher: o.publisher.clone().heartbeat(v), ..o },
            short,
        ),
        (
            "PublisherOptions::lease_ttl",
            |o, v| Options { publisher: o.publisher.clone().lease_ttl(v), ..o },
            lease,
        ),
        (
            "AggregateOptions::idle_timeout",
            |o, v| Options { aggregate: o.aggregate.idle_timeout(v), ..o },
            none,
        ),
        (
            "AggregateOptions::admission_timeout",
            |o, v| Options { aggregate: o.aggregate.admission_timeout(v), ..o },
            none,
        ),
        (
            "HandlerOptions::admission_timeout",
            |o, v| Options { handler: o.handler.clone().admission_timeout(v), ..o },
            none,
        ),
        (
            "ProjectionOptions::batch_time",
            |o, v| Options { projection: o.projection.clone().batch_time(v), ..o },
            none,
        ),
        (
            "ProjectionOptions::initial_backoff",
            |o, v| Options { projection: o.projection.clone().initial_backoff(v).max_backoff(v), ..o },
            short,
        ),
        (
            "ProjectionOptions::lease",
            |o, v| Options { projection: o.projection.clone().lease(v), ..o },
            lease,
        ),
        (
            "Schedule::Every",
            |o, v| Options { projection: o.projection.clone().schedule(Schedule::Every(v)), ..o },
            none,
        ),
        (
            "Schedule::Debounced quiet",
            |o, v| {
                let schedule = Schedule::Debounced { quiet: v, cap: Duration::from_millis(50) };
                Options { projection: o.projection.clone().schedule(schedule), ..o }
            },
            none,
        ),
        (
            "Schedule::Debounced cap",
            |o, v| {
                let schedule = Schedule::Debounced { quiet: Duration::from_millis(50), cap: v };
                Options { projection: o.projection.clone().schedule(schedule), ..o }
            },
            none,
        ),
    ];
    for (option, set, refused) in rows {
        try_each(option, set, &TIMES, refused).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_are_in_their_range_or_refused() {
    let (zero, ends) = (&[0][..], &[0, usize::MAX][..]);
    let rows: [(&str, Set<usize>, &[usize]); 9] = [
        ("FeedOptions::capacity", |o, v| Options { feed: o.feed.clone().capacity(v), ..o }, ends),
        ("AggregateOptions::max_live", |o, v| Options { aggregate: o.aggregate.max_live(v), ..o }, zero),
        (
            "AggregateOptions::max_in_flight",
            |o, v| Options { aggregate: o.aggregate.max_in_flight(v), ..o },
            ends,
        ),
        (
            "AggregateOptions::max_in_flight_per_aggregate",
            |o, v| Options { aggregate: o.aggregate.max_in_flight_per_aggregate(v), ..o },
            ends,
        ),
        ("HandlerOptions::workers", |o, v| Options { handler: o.handler.clone().workers(v), ..o }, ends),
        (
            "HandlerOptions::max_in_flight",
            |o, v| Options { handler: o.handler.clone().max_in_flight(v), ..o },
            ends,
        ),
        (
            "ProjectionOptions::batch_size",
            |o, v| Options { projection: o.projection.clone().batch_size(v), ..o },
            ends,
        ),
        ("InMemory::snapshot_every", |o, v| Options { snapshots: Some(v as u64), ..o }, zero),
        ("InMemory::snapshot_every", |o, v| Options { index_snapshots: Some(v as u64), ..o }, zero),
    ];
    for (option, set, refused) in rows {
        try_each(option, set, &COUNTS, refused).await;
    }
    let few: [(&str, Set<u32>); 2] = [
        ("AggregateOptions::max_attempts", |o, v| Options { aggregate: o.aggregate.max_attempts(v), ..o }),
        ("ProjectionOptions::max_attempts", |o, v| Options {
            projection: o.projection.clone().max_attempts(v),
            ..o
        }),
    ];
    for (option, set) in few {
        try_each(option, set, &[0, 1, u32::MAX], &[0]).await;
    }
    let every: Set<u64> =
        |o, v| Options { aggregate: o.aggregate.snapshot_every(v, SnapshotRevision(1)), ..o };
    try_each("AggregateOptions::snapshot_every", every, &[0, 1, u64::MAX], &[0]).await;
    // The wrong order.
    let backoff =
        ProjectionOptions::new().initial_backoff(Duration::from_secs(2)).max_backoff(Duration::from_secs(1));
    let builder = Options { projection: backoff, ..Options::default() }.builder().store(MemoryStore::new());
    assert_named(&run(builder).await.unwrap_err().to_string(), "ProjectionOptions::max_backoff");
}

fn assert_refused<T>(result: Result<T, StoreError>, option: &str) {
    match result {
        Err(StoreError::Invalid { reason }) => assert_named(&reason, option),
        Err(error) => panic!("{option}: {error}"),
        Ok(_) => panic!("{option} was accepted"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_options_are_in_their_range_or_refused() {
    let dir = tempfile::TempDir::new().unwrap();
    let files = std::sync::atomic::AtomicU64::new(0);
    let options = || {
        let file = files.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        SqliteOptions::new(dir.path().join(format!("events-{file}.db")))
    };
    let refused = [("SqliteOptions::busy_timeout", options().busy_timeout(Duration::MAX))];
    for (option, options) in refused {
        assert_refused(options.open().await, option);
    }
    let taken = [
        options().busy_timeout(ZERO),
        options().busy_timeout(NANO),
        options().busy_timeout(Duration::from_secs(24 * 60 * 60)),
    ];
    for options in taken {
        let store = options.open().await.unwrap();
        let runtime = Runtime::builder().store(store).aggregate::<Counter>().start().await.unwrap();
        runtime.execute::<Counter>("one", Add(1)).await.unwrap();
        runtime.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_options_are_in_their_range_or_refused() {
    let url = crate::support::PostgresServer::shared().await.create_database().await;
    let options = || PostgresOptions::new().url(&url);
    let refused = [
        ("PostgresOptions::max_connections", options().max_connections(0)),
        ("PostgresOptions::max_connections", options().max_connections(u32::MAX)),
        ("PostgresOptions::acquire_timeout", options().acquire_timeout(ZERO)),
        ("PostgresOptions::acquire_timeout", options().acquire_timeout(Duration::MAX)),
        ("PostgresOptions::statement_timeout", options().statement_timeout(NANO)),
        ("PostgresOptions::statement_timeout", options().statement_timeout(Duration::MAX)),
        ("PostgresOptions::application_name", options().application_name("a\0b")),
        ("PostgresOptions::application_name", options().application_name("x".repeat(64))),
    ];
    for (option, options) in refused {
        assert_refused(options.connect().await, option);
    }
    let day = Duration::from_secs(24 * 60 * 60);
    let taken = [
        options().max_connections(1),
        options().max_connections(10_000),
        options().acquire_timeout(day).statement_timeout(day),
        options().statement_timeout(ZERO),
        options().application_name(""),
    ];
    for options in taken {
        let store = options.connect().await.unwrap();
        let runtime = Runtime::builder().store(store).aggregate::<Counter>().start().await.unwrap();
        runtime.execute::<Counter>("one", Add(1)).await.unwrap();
        runtime.shutdown().await.unwrap();
    }
}

/// Checks that the order of two options does not matter.
///
/// Each aggregate has its default, or the whole limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_limit_counts_for_each_aggregate_too() {
    let options = AggregateOptions::<Counter>::new().max_in_flight(10).max_in_flight(5_000);
    assert!(format!("{options:?}").contains("max_in_flight_per_aggregate: 1024"), "{options:?}");
    let options = AggregateOptions::<Counter>::new().max_in_flight(10);
    assert!(format!("{options:?}").contains("max_in_flight_per_aggregate: 10"), "{options:?}");
    let options = AggregateOptions::<Counter>::new().max_in_flight_per_aggregate(3).max_in_flight(5_000);
    assert!(format!("{options:?}").contains("max_in_flight_per_aggregate: 3"), "{options:?}");
}

/// A file of an option is checked before it is opened: a FIFO would wait for a writer, and a device
/// has no end.
#[cfg(feature = "nats")]
#[tokio::test]
async fn files_of_nats_options_are_regular_and_bounded() {
    use storied::NatsOptions;
    use storied::bus::BusError;

    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let (fifo, large, good) = (file("fifo"), file("large"), file("good"));
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    std::fs::write(&large, vec![b'x'; (1 << 20) + 1]).unwrap();
    std::fs::write(&good, "x").unwrap();
    let directory = dir.path().display().to_string();
    type With<'a> = Box<dyn Fn(NatsOptions, &str) -> NatsOptions + 'a>;
    let ways: [(&str, With<'_>); 4] = [
        ("credentials_file", Box::new(|options, path| options.credentials_file(path))),
        ("root_certificates", Box::new(|options, path| options.root_certificates(path))),
        ("client_certificate", Box::new(|options, path| options.client_certificate(path, &good))),
        ("client_certificate", Box::new(|options, path| options.client_certificate(&good, path))),
    ];
    for (option, with) in ways {
        for (path, problem) in [
            (fifo.as_str(), "is not a regular file"),
            ("/dev/null", "is not a regular file"),
            (&large, "has 1048577 bytes (limit 1048576)"),
            (&directory, "is a directory"),
            ("/no/such/file", "does not exist"),
        ] {
            let bus = with(NatsOptions::core().url("nats://127.0.0.1:9"), path).bus();
            let error = timeout(PATIENCE, bus.connect()).await.expect("an answer").unwrap_err();
            let BusError::Incompatible { reason } = &error else { panic!("{option} {path}: {error}") };
            let expected = format!("NatsOptions::{option}: {path} {problem}");
            assert!(reason.starts_with(&expected), "{expected}: {reason}");
        }
    }
    let bus = NatsOptions::core().url("nats://127.0.0.1:9").credentials_file(&good).bus();
    let error = bus.connect().await.unwrap_err().to_string();
    assert!(error.contains("contains no JWT and seed"), "{error}");
}

/// A setter stores any value; the start and the connect refuse a wrong one, and name the option.
#[cfg(feature = "nats")]
#[tokio::test]
async fn names_of_nats_options_are_checked_at_the_start() {
    use storied::NatsOptions;
    use storied::bus::{BusError, Subjects};
    use storied::command::{CommandBus, NatsCommandOptions};

    let core = || NatsOptions::core().url("nats://127.0.0.1:9");
    let identity = Subjects::identity(["counter.*"]).unwrap().partitions(std::num::NonZeroU16::MIN);
    for (option, options) in [
        ("NatsOptions::namespace", core().namespace("a b")),
        ("NatsOptions::inbox_prefix", core().inbox_prefix("a.>")),
        ("Subjects::partitions", core().subjects(identity)),
    ] {
        let connected = options.clone().bus().connect().await.unwrap_err();
        let with_bus = Runtime::builder().store(MemoryStore::new()).bus(options.clone().bus());
        let with_bus = with_bus.aggregate::<Counter>().start().await;
        let commands = CommandBus::nats(NatsCommandOptions::new(options));
        let with_commands = Runtime::builder().store(MemoryStore::new()).commands(commands);
        let with_commands = with_commands.aggregate::<Counter>().start().await;
        let started = |runtime| match runtime {
            Err(StartError::Bus(error)) => error,
            other => panic!("{option}: {other:?}"),
        };
        for error in [connected, started(with_bus), started(with_commands)] {
            let BusError::Incompatible { reason } = error else { panic!("{option}: {error}") };
            assert!(reason.contains(option), "{option}: {reason}");
        }
    }
}
