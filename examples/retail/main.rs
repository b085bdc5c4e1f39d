//! Replays the invoices of a real business through storied.
//!
//! Every invoice is an aggregate, every row of the file a command, and two projections keep revenue
//! and units. See `--help` for the options, and README.md for the order of reading.

mod args;
mod domain;
mod import;
mod nodes;
mod projections;
mod report;
mod rows;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use sqlx::Connection;
use sqlx::postgres::PgPoolOptions;
use storied::bus::JetStreamOptions;
use storied::projection::WaitError;
use storied::runtime::Builder;
use storied::{
    AggregateOptions, EventStore, NatsBus, NatsOptions, Position, PostgresOptions, PostgresReadModel,
    ProjectionOptions, ReadLog, Runtime, SqliteReadModel, SqliteStore, StoreError,
};

use self::args::{Args, Bus, StoreKind, USAGE};
use self::domain::Invoice;
use self::import::ImportError;
use self::nodes::Nodes;
use self::projections::{REVENUE, ReadModels, UNITS};
use self::report::{Progress, Report};
use self::rows::{RowError, Rows};

/// The schema of the log in PostgreSQL.
const SCHEMA: &str = "storied_retail";
/// Command window of an invoice. A longer invoice still takes no line twice, see `domain.rs`.
const COMMAND_WINDOW: usize = 1_000;
/// Time for which a killed run keeps the read models from the next run.
const LEASE: Duration = Duration::from_secs(1);
/// Maximum time of a first connection to PostgreSQL.
const ANSWER: Duration = Duration::from_secs(2);
/// Maximum time of the read models to catch up after the last command.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .init();
    let args = match Args::parse(std::env::args_os().skip(1)) {
        Ok(args) if args.help => {
            return match write!(io::stdout(), "{USAGE}") {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("error: writing the output failed: {error}");
                    ExitCode::FAILURE
                }
            };
        }
        Ok(args) => args,
        Err(error) => {
            eprintln!("error: {error}; --help lists the options");
            return ExitCode::from(2);
        }
    };
    let ended = if args.node { serve(&args).await } else { run(&args).await };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The cause of a failed run. Its finished work stays done.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Rows(#[from] RowError),
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Bus(#[from] storied::bus::BusError),
    #[error(transparent)]
    Namespace(#[from] storied::event::InvalidName),
    #[error("deleting the log stream of the old database: {0}")]
    LogStream(String),
    #[error(transparent)]
    Start(#[from] storied::runtime::StartError),
    #[error(transparent)]
    NoProjection(#[from] storied::runtime::UnknownProjection),
    #[error("the read model {0} is paused; resume it with `storied projection resume {0}`")]
    Paused(&'static str),
    #[error("{0}; run it again to continue")]
    Behind(#[from] storied::projection::WaitError),
    #[error(transparent)]
    Shutdown(#[from] storied::runtime::ShutdownError),
    #[error("a database failed: {0}")]
    Database(#[from] sqlx::Error),
    #[error("PostgreSQL did not answer within {0:?}; check host and port of its URL")]
    NoAnswer(Duration),
    #[error("--store postgres needs --database-url, or DATABASE_URL in the environment")]
    NoDatabaseUrl,
    #[error("starting or ending another node: {0}")]
    Nodes(io::Error),
    #[error("{} is no SQLite database; --reset does not delete it", .0.display())]
    NoDatabase(PathBuf),
    #[error("{}: {error}", path.display())]
    Reset { path: PathBuf, error: io::Error },
    #[error("writing the report: {0}")]
    Report(#[from] io::Error),
}

async fn run(args: &Args) -> Result<(), Failure> {
    let rows = Rows::open(&args.input)?;
    if args.reset {
        match args.store {
            StoreKind::Sqlite => {
                delete_database(&args.db)?;
                delete_database(&args.read_models())?;
            }
            StoreKind::Postgres => drop_schema(args).await?,
        }
    }
    // Before any file is created, so that an unreachable bus leaves none.
    let builder = match nats(args)? {
        Some(bus) => {
            bus.connect().await?;
            if args.reset && args.bus == Bus::JetStream {
                delete_log_stream(&bus).await?;
            }
            Runtime::builder().bus(bus)
        }
        None => Runtime::builder(),
    };
    let read_models = read_models(args).await?;
    let builder = node(builder, args, &read_models).await?;
    read_models.create_tables().await?;
    let runtime = builder
        .aggregate_with(AggregateOptions::<Invoice>::new().command_window(COMMAND_WINDOW))
        .start()
        .await?;
    // Only now, because the other nodes need a prepared database.
    let nodes = Nodes::start(args)?;

    let mut progress = Progress::new();
    let (tally, imported) = import::import(&runtime, rows, &mut progress).await;
    let caught_up = caught_up(&runtime, tally.position).await;
    let took = progress.done();

    let events = count_events(&**runtime.store()).await;
    nodes.end().await?;
    let ended = runtime.shutdown().await;
    // Only after the orderly shutdown of the node. The first error is reported.
    imported?;
    caught_up?;
    ended?;
    let events = events?;
    let totals = read_models.totals().await?;
    read_models.close().await;
    let report = Report::new(&tally, events, totals, took);
    let mut out = io::stdout().lock();
    let written = if args.json { report.write_json(&mut out) } else { report.write_text(&mut out) };
    match written.and_then(|()| out.flush()) {
        // The reader of the pipe has enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// Runs another node: it keeps its share of the read models until the first one ends.
async fn serve(args: &Args) -> Result<(), Failure> {
    let read_models = read_models(args).await?;
    let builder = match nats(args)? {
        Some(bus) => Runtime::builder().bus(bus),
        None => Runtime::builder(),
    };
    let runtime = node(builder, args, &read_models).await?.start().await?;
    nodes::until_the_first_ends().await;
    runtime.shutdown().await?;
    read_models.close().await;
    Ok(())
}

/// Adds the parts that every node has.
async fn node(builder: Builder, args: &Args, read_models: &ReadModels) -> Result<Builder, Failure> {
    let builder = match args.store {
        StoreKind::Sqlite => builder.store(SqliteStore::open(&args.db).await?),
        StoreKind::Postgres => builder.store(postgres(args).connect().await?),
    };
    Ok(read_models.keep(builder, &ProjectionOptions::new().lease(LEASE)))
}

async fn read_models(args: &Args) -> Result<ReadModels, Failure> {
    Ok(match args.store {
        StoreKind::Sqlite => ReadModels::Sqlite(SqliteReadModel::open(args.read_models()).await?),
        StoreKind::Postgres => {
            // After the store has connected, because its errors name the cause.
            let pool = PgPoolOptions::new().acquire_timeout(PATIENCE);
            let url = args.database_url.clone().or_else(|| std::env::var("DATABASE_URL").ok());
            let pool = pool.connect_lazy(&url.ok_or(Failure::NoDatabaseUrl)?)?;
            ReadModels::Postgres(PostgresReadModel::new(pool).schema(SCHEMA)?)
        }
    })
}

/// Returns the options of the log in PostgreSQL, in a schema of its own.
fn postgres(args: &Args) -> PostgresOptions {
    // Notifies other nodes at once.
    let options = PostgresOptions::new().schema(SCHEMA).application_name("retail").notify(args.nodes > 1);
    match &args.database_url {
        Some(url) => options.url(url),
        None => options, // $DATABASE_URL
    }
}

async fn drop_schema(args: &Args) -> Result<(), Failure> {
    let url = args.database_url.clone().or_else(|| std::env::var("DATABASE_URL").ok());
    // Without a URL, connecting reports the missing option.
    let Some(url) = url else { return Ok(()) };
    let connecting = sqlx::PgConnection::connect(&url);
    let mut connection =
        tokio::time::timeout(ANSWER, connecting).await.map_err(|_| Failure::NoAnswer(ANSWER))??;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("DROP SCHEMA IF EXISTS {SCHEMA}, retail CASCADE")))
        .execute(&mut connection)
        .await?;
    Ok(connection.close().await?)
}

/// Waits until the read models have applied everything of the import.
async fn caught_up(runtime: &Runtime, position: Position) -> Result<(), Failure> {
    for name in [REVENUE, UNITS] {
        let projection = runtime.projection(name)?;
        let give_up = Instant::now() + PATIENCE;
        loop {
            match projection.caught_up_to_within(position, Duration::from_secs(1)).await {
                Ok(()) => break,
                Err(WaitError::Paused { .. }) => return Err(Failure::Paused(name)),
                Err(WaitError::TimedOut { .. }) if Instant::now() < give_up => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// Returns the bus over NATS, if selected.
fn nats(args: &Args) -> Result<Option<NatsBus>, Failure> {
    let options = match args.bus {
        Bus::Local => return Ok(None),
        Bus::Core => NatsOptions::core(),
        Bus::JetStream => NatsOptions::jetstream(JetStreamOptions::new()),
    };
    let options = options.namespace("retail");
    Ok(Some(match &args.nats_url {
        Some(url) => options.url(url).bus(),
        None => options.bus(),
    }))
}

/// Deletes the log stream of a store that is replaced; another store cannot continue it.
async fn delete_log_stream(bus: &NatsBus) -> Result<(), Failure> {
    let jetstream = async_nats::jetstream::new(bus.client().await?);
    if jetstream.get_stream("RETAIL_EVENTS").await.is_ok() {
        jetstream
            .delete_stream("RETAIL_EVENTS")
            .await
            .map_err(|error| Failure::LogStream(error.to_string()))?;
    }
    Ok(())
}

/// Counts the events of the log by reading it.
async fn count_events(store: &dyn EventStore) -> Result<u64, StoreError> {
    let (mut events, mut read) = (0, Position::START);
    loop {
        let page = store.read_log(ReadLog::after(read)).await?;
        events += page.events.len() as u64;
        read = page.scanned_to;
        if !page.has_more() {
            return Ok(events);
        }
    }
}

/// Deletes a SQLite database with the files of SQLite next to it, and no other file.
fn delete_database(path: &Path) -> Result<(), Failure> {
    let failed = |error| Failure::Reset { path: path.to_owned(), error };
    match path.metadata() {
        // Opening a FIFO would wait for a writer.
        Ok(file) if !file.is_file() => return Err(Failure::NoDatabase(path.to_owned())),
        Ok(_) => {
            let mut magic = Vec::new();
            File::open(path).and_then(|file| file.take(16).read_to_end(&mut magic)).map_err(failed)?;
            if !magic.is_empty() && magic != b"SQLite format 3\0" {
                return Err(Failure::NoDatabase(path.to_owned()));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    for suffix in ["", "-wal", "-shm"] {
        let mut file = path.as_os_str().to_owned();
        file.push(suffix);
        match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    Ok(())
}
