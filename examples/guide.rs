//! The code of `docs/guide.md`: tickets for shows.
//!
//! ```sh
//! cargo run --example guide             # one process, SQLite, in a temporary directory
//! cargo run --example guide -- migrate  # creates the tables of the read model in PostgreSQL
//! ($DATABASE_URL)
//! cargo run --example guide -- node     # one of several nodes: PostgreSQL and NATS ($NATS_URL);
//! ends with Ctrl-C
//! cargo run --example guide -- sell     # buys 100 tickets from the nodes
//! ```

#![allow(missing_docs, missing_debug_implementations, reason = "docs/guide.md explains everything")]

use std::error::Error;
use std::io::{Write, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection, PgPool, SqliteConnection, SqlitePool};
use storied::command::{CommandBus, NatsCommandOptions};
use storied::process::{Input, InstanceState, Next, Process, ProcessContext, Routes};
use storied::projection::{ApplyError, InMemoryIndex, Projection, ProjectionState};
use storied::runtime::Builder;
use storied::{
    Aggregate, Context, Decided, Decision, Event, ExecuteError, Filter, NatsOptions, PostgresReadModel,
    PostgresStore, PublisherState, RecordedEvent, Recurrence, Runtime, SqliteReadModel, SqliteStore,
};
use uuid::Uuid;

type Failure = Box<dyn Error + Send + Sync>;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShowEvent {
    Announced { title: String, seats: u32 },
    Sold { buyer: String, seats: u32 },
    SoldOut,
}

impl Event for ShowEvent {
    const CATEGORY: &'static str = "show";
}

#[derive(Debug, Serialize, Deserialize)]
pub enum ShowCommand {
    Announce { title: String, seats: u32 },
    Sell { buyer: String, seats: u32 },
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum ShowError {
    #[error("there is no such show")]
    Unknown,
    #[error("the show was announced before")]
    AlreadyAnnounced,
    #[error("only {left} seats are left")]
    TooFew { left: u32 },
}

#[derive(Debug, Default)]
pub struct Show {
    announced: bool,
    left: u32,
}

impl Aggregate for Show {
    type Event = ShowEvent;
    type Command = ShowCommand;
    type Reply = u32; // the seats that are left
    type Error = ShowError;

    fn handle(&self, command: &ShowCommand, _: &Context<'_>) -> Decided<Self> {
        match command {
            ShowCommand::Announce { .. } if self.announced => Err(ShowError::AlreadyAnnounced),
            ShowCommand::Announce { title, seats } => {
                let announced = ShowEvent::Announced { title: title.clone(), seats: *seats };
                Ok(Decision::event(announced).reply(*seats))
            }
            ShowCommand::Sell { .. } if !self.announced => Err(ShowError::Unknown),
            ShowCommand::Sell { seats, .. } if *seats > self.left => {
                Err(ShowError::TooFew { left: self.left })
            }
            ShowCommand::Sell { buyer, seats } => {
                let left = self.left - seats;
                let mut events = vec![ShowEvent::Sold { buyer: buyer.clone(), seats: *seats }];
                if left == 0 {
                    events.push(ShowEvent::SoldOut);
                }
                Ok(Decision::events(events).reply(left))
            }
        }
    }

    fn apply(&mut self, event: &ShowEvent) {
        match event {
            ShowEvent::Announced { seats, .. } => (self.announced, self.left) = (true, *seats),
            ShowEvent::Sold { seats, .. } => self.left -= seats,
            ShowEvent::SoldOut => {}
        }
    }
}

/// Executes commands in one process.
pub async fn commands(directory: &Path) -> Result<(), Failure> {
    let store = SqliteStore::open(directory.join("shows.db")).await?;
    let runtime = Runtime::builder().store(store).aggregate::<Show>().start().await?;

    let announce = ShowCommand::Announce { title: "Hamlet".into(), seats: 3 };
    runtime.execute::<Show>("hamlet", announce).await?;

    let ada = || ShowCommand::Sell { buyer: "Ada".into(), seats: 2 };
    let order = Uuid::now_v7(); // created with the order; a retry sends the same id
    let receipt = runtime.execute::<Show>("hamlet", ada()).command_id(order).await?;
    assert_eq!((receipt.version.get(), receipt.reply), (2, 1));

    let again = runtime.execute::<Show>("hamlet", ada()).command_id(order).await?;
    assert!(again.duplicate && again.reply == 1); // the first receipt: two seats are sold, not four

    let rejected = runtime.execute::<Show>("hamlet", ada()).await.err();
    assert_eq!(rejected.as_ref().and_then(ExecuteError::rejection), Some(&ShowError::TooFew { left: 1 }));
    runtime.shutdown().await?;
    Ok(())
}

pub struct Sales;

impl Projection for Sales {
    const NAME: &'static str = "sales";
    type Event = ShowEvent;
    type Transaction = SqliteConnection;

    fn filter(&self) -> Filter {
        Filter::variants::<ShowEvent>(["sold"])
    }

    async fn apply(
        &mut self,
        event: ShowEvent,
        recorded: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        if let ShowEvent::Sold { buyer, seats } = event {
            sqlx::query("INSERT INTO sales (show, buyer, seats) VALUES (?, ?, ?)")
                .bind(recorded.stream.id().to_owned())
                .bind(buyer)
                .bind(seats)
                .execute(tx)
                .await?;
        }
        Ok(())
    }

    async fn reset(&mut self, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        sqlx::query("DELETE FROM sales").execute(tx).await?;
        Ok(())
    }
}

/// Keeps a read model in its own database.
pub async fn projections(directory: &Path) -> Result<(), Failure> {
    let read =
        SqlitePool::connect(&format!("sqlite:{}?mode=rwc", directory.join("read.db").display())).await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS sales (show TEXT, buyer TEXT, seats INTEGER)")
        .execute(&read)
        .await?;

    let titles = InMemoryIndex::new("titles", |titles: &mut Vec<String>, event: ShowEvent, _| {
        if let ShowEvent::Announced { title, .. } = event {
            titles.push(title);
        }
        Ok(())
    })
    .filter(Filter::variants::<ShowEvent>(["announced"]));

    let runtime = Runtime::builder()
        .store(SqliteStore::open(directory.join("shows.db")).await?)
        .aggregate::<Show>()
        .projection(Sales, SqliteReadModel::new(read.clone()))
        .in_memory_index(&titles)
        .start()
        .await?;

    let sell = ShowCommand::Sell { buyer: "Bob".into(), seats: 1 };
    let receipt = runtime.execute::<Show>("hamlet", sell).await?;
    runtime.projection("sales")?.caught_up_to(receipt.position).await?;
    let sold: i64 = sqlx::query_scalar("SELECT sum(seats) FROM sales").fetch_one(&read).await?;
    assert_eq!(sold, 3); // Bob's seat, and Ada's two from before this projection existed

    titles.ready(Duration::from_secs(10)).await?;
    assert_eq!(titles.read(|titles| titles.clone()), ["Hamlet"]);

    let sales = runtime.projection("sales")?;
    sales.reset().await?; // empties the table and applies the log from its start
    sales.wait_until_caught_up(Duration::from_secs(10)).await?;
    let sold: i64 = sqlx::query_scalar("SELECT sum(seats) FROM sales").fetch_one(&read).await?;
    assert_eq!(sold, 3);

    let status = runtime.status().await;
    assert_eq!(status.projections["sales"].state, ProjectionState::Following);
    assert_eq!(status.projections["sales"].lag(), Some(0));
    runtime.shutdown().await?;
    Ok(())
}

#[derive(Default)]
pub struct ExtraNight;

impl Process for ExtraNight {
    const NAME: &'static str = "extra_night";
    type Event = ShowEvent;

    fn routes() -> Routes<ShowEvent> {
        Routes::new().starts(["sold_out"], |_: &ShowEvent, recorded| recorded.stream.id().to_owned())
    }

    fn react(&self, _: Input<'_, ShowEvent>, context: &ProcessContext<'_>) -> Next {
        let announce = ShowCommand::Announce { title: "An extra night".into(), seats: 3 };
        Next::new().execute::<Show>("announce", format!("{}-extra", context.id()), announce).complete()
    }
}

/// Announces another show when one is sold out.
pub async fn processes(directory: &Path) -> Result<(), Failure> {
    let runtime = Runtime::builder()
        .store(SqliteStore::open(directory.join("shows.db")).await?)
        .aggregate::<Show>()
        .process::<ExtraNight>()
        .start()
        .await?;

    let announce = ShowCommand::Announce { title: "Tosca".into(), seats: 1 };
    runtime.execute::<Show>("tosca", announce).await?;
    let sell = || ShowCommand::Sell { buyer: "Ada".into(), seats: 1 };
    runtime.execute::<Show>("tosca", sell()).await?; // the last seat

    let instance = runtime.process::<ExtraNight>("tosca");
    let ended = |state, open: usize| state == InstanceState::Completed && open == 0;
    while !instance.status().await?.is_some_and(|status| ended(status.state, status.effects.len())) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(runtime.execute::<Show>("tosca-extra", sell()).await?.reply, 2);
    retry(&runtime, "tosca").await?;
    runtime.shutdown().await?;
    Ok(())
}

/// Continues an instance that is parked.
pub async fn retry(runtime: &Runtime, show: &str) -> Result<(), Failure> {
    let instance = runtime.process::<ExtraNight>(show);
    if let Some(reason) = instance.status().await?.and_then(|status| status.parked) {
        eprintln!("the instance of {show} is parked: {reason}");
        instance.retry().await?; // or cancel(), or compensate()
    }
    Ok(())
}

const HOUR: Duration = Duration::from_secs(60 * 60);

/// Announces a show later, and sells a seat every night.
pub async fn schedules(directory: &Path) -> Result<(), Failure> {
    let runtime = Runtime::builder()
        .store(SqliteStore::open(directory.join("shows.db")).await?)
        .aggregate::<Show>()
        .start()
        .await?;

    let announce = ShowCommand::Announce { title: "Norma".into(), seats: 9 };
    let id = Uuid::now_v7(); // from the request, so that a retry schedules nothing twice
    let scheduled = runtime.execute::<Show>("norma", announce).command_id(id).after(HOUR).await?;
    writeln!(stdout(), "due at {}", scheduled.due_at)?;
    runtime.scheduled_command(id).cancel().await?;

    let sell = ShowCommand::Sell { buyer: "the house".into(), seats: 1 };
    let nightly = Recurrence::cron("30 2 * * *", "Europe/Berlin")?;
    runtime.execute::<Show>("tosca-extra", sell).repeat("house seat", nightly).await?;
    let schedule = runtime.schedule("house seat");
    let command = schedule.trigger().await?; // once, now
    while runtime.scheduled_command(command).status().await?.is_some() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(schedule.status().await?.map(|status| status.created), Some(1));
    runtime.shutdown().await?;
    Ok(())
}

pub struct SharedSales;

impl Projection for SharedSales {
    const NAME: &'static str = "sales";
    type Event = ShowEvent;
    type Transaction = PgConnection;

    fn filter(&self) -> Filter {
        Filter::variants::<ShowEvent>(["sold"])
    }

    async fn apply(
        &mut self,
        event: ShowEvent,
        recorded: &RecordedEvent,
        tx: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        if let ShowEvent::Sold { buyer, seats } = event {
            sqlx::query("INSERT INTO sales (show, buyer, seats) VALUES ($1, $2, $3)")
                .bind(recorded.stream.id().to_owned())
                .bind(buyer)
                .bind(i64::from(seats))
                .execute(tx)
                .await?;
        }
        Ok(())
    }
}

pub async fn migrate(database: &str) -> Result<(), Failure> {
    let mut connection = PgConnection::connect(database).await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS sales (show text, buyer text, seats bigint)")
        .execute(&mut connection)
        .await?;
    Ok(())
}

async fn shared(database: &str, nats: &str) -> Result<Builder, Failure> {
    let nats = |options: NatsOptions| options.url(nats).namespace("shows");
    Ok(Runtime::builder()
        .store(PostgresStore::connect(database).await?)
        .bus(nats(NatsOptions::core()).bus())
        .commands(CommandBus::nats(NatsCommandOptions::new(nats(NatsOptions::core())))))
}

/// Starts a node that runs the shows.
pub async fn node(database: &str, nats: &str) -> Result<Runtime, Failure> {
    let builder = shared(database, nats).await?.aggregate::<Show>();
    let read = PgPool::connect(database).await?;
    Ok(builder.projection(SharedSales, PostgresReadModel::new(read)).start().await?)
}

/// Starts a node without shows, which sends commands to the nodes that run them.
pub async fn box_office(database: &str, nats: &str) -> Result<Runtime, Failure> {
    Ok(shared(database, nats).await?.start().await?)
}

/// Sells seats one by one, also while nodes stop. Returns the number of sold seats.
pub async fn sell(runtime: &Runtime, show: &str, seats: u32) -> Result<u32, Failure> {
    let mut sold = 0;
    for _ in 0..seats {
        let order = Uuid::now_v7();
        loop {
            let sell = ShowCommand::Sell { buyer: "Carol".into(), seats: 1 };
            match runtime.execute::<Show>(show, sell).command_id(order).await {
                Ok(_) => sold += 1,
                Err(ExecuteError::Rejected(ShowError::TooFew { .. })) => {}
                Err(error) if error.is_transient() => {
                    eprintln!("{error}; retrying");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue; // with the same id, so it takes effect once
                }
                Err(error) => return Err(error.into()),
            }
            break;
        }
    }
    Ok(sold)
}

/// Returns one line for each problem of a node.
pub async fn trouble(runtime: &Runtime) -> Vec<String> {
    let status = runtime.status().await;
    let mut trouble = Vec::new();
    if let Ok(Some(stall)) = &status.stall
        && stall.open_for > Duration::from_secs(5)
    {
        trouble.push(format!("the log is held back by {:?} for {:?}", stall.pid, stall.open_for));
    }
    if let Err(error) = &status.high_water_mark {
        trouble.push(format!("reading the store failed: {error}"));
    }
    if let PublisherState::Retrying { error } = &status.publisher.state {
        trouble.push(format!("publishing failed: {error}"));
    }
    for (name, projection) in &status.projections {
        if matches!(projection.state, ProjectionState::Failed | ProjectionState::Retrying) {
            trouble.push(format!("{name} {:?}: {:?}", projection.state, projection.last_error));
        }
        match projection.lag() {
            Some(lag) if lag > 10_000 => trouble.push(format!("{name} has {lag} positions to apply")),
            Some(_) => {}
            None => trouble.push(format!("{name} has not read its checkpoint and the log yet")),
        }
    }
    trouble
}

async fn serve(runtime: Runtime) -> Result<(), Failure> {
    let mut every = tokio::time::interval(Duration::from_secs(10));
    loop {
        tokio::select! {
            _ = every.tick() => trouble(&runtime).await.iter().for_each(|line| eprintln!("{line}")),
            ended = tokio::signal::ctrl_c() => {
                ended?;
                return Ok(runtime.shutdown().await?); // answers commands in flight, releases leases
            }
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Failure> {
    tracing_subscriber::fmt().with_env_filter("warn").with_writer(std::io::stderr).init();
    let Some(what) = std::env::args().nth(1) else {
        let directory = tempfile::tempdir()?;
        commands(directory.path()).await?;
        projections(directory.path()).await?;
        processes(directory.path()).await?;
        schedules(directory.path()).await?;
        writeln!(stdout(), "3 seats were sold, once each")?;
        return Ok(());
    };
    if !["migrate", "node", "sell"].contains(&&*what) {
        return Err(format!("{what} is none of: migrate, node, sell").into());
    }
    let database = std::env::var("DATABASE_URL")
        .map_err(|_| "DATABASE_URL is not set; set it to the URL of a PostgreSQL database")?;
    let nats = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".into());
    match &*what {
        "migrate" => tokio::time::timeout(Duration::from_secs(2), migrate(&database))
            .await
            .map_err(|_| "PostgreSQL did not answer within 2 s")?,
        "node" => serve(node(&database, &nats).await?).await,
        "sell" => {
            let runtime = box_office(&database, &nats).await?;
            let show = Uuid::now_v7().to_string();
            let announce = ShowCommand::Announce { title: "Macbeth".into(), seats: 1_000 };
            runtime.execute::<Show>(&show, announce).await?;
            writeln!(stdout(), "{} sold", sell(&runtime, &show, 100).await?)?;
            Ok(runtime.shutdown().await?)
        }
        other => Err(format!("{other} is none of: migrate, node, sell").into()),
    }
}
