//! evento 2 (alpha): a projection is loaded, written to and committed, as its README has it; `SubscriptionBuilder`.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evento::metadata::Event;
use evento::migrator::{Migrate, Plan};
use evento::subscription::{Context, SubscriptionBuilder};
use evento::{Executor, Projection, ProjectionAggregate};
use sqlx::postgres::PgPoolOptions;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::*;
use crate::{Sizes, Workload};

#[evento::aggregate(name = "bank/Account")]
pub enum Bank {
    Opened { account: String },
    Deposited { account: String, amount: i64, currency: String, reference: String, memo: String },
}

fn deposited(money: Money) -> Deposited {
    let Money { account, amount, currency, reference, memo } = money;
    Deposited { account, amount, currency, reference, memo }
}

/// Replays the stream for every command.
#[evento::projection(id = id)]
#[evento::snapshot(none)]
pub struct Plain {
    pub id: String,
    pub opened: bool,
    pub balance: i64,
    pub count: u64,
}

#[evento::handler]
async fn plain_opened(event: Event<Opened>, state: &mut Plain) -> anyhow::Result<()> {
    state.id = event.aggregate_id.to_owned();
    state.opened = true;
    Ok(())
}

#[evento::handler]
async fn plain_deposited(event: Event<Deposited>, state: &mut Plain) -> anyhow::Result<()> {
    state.balance += event.data.amount;
    state.count += 1;
    Ok(())
}

/// The write model of its README: kept in the memory of the process.
#[evento::projection(id = id)]
#[evento::snapshot(memory)]
pub struct Kept {
    pub id: String,
    pub opened: bool,
    pub balance: i64,
    pub count: u64,
}

#[evento::handler]
async fn kept_opened(event: Event<Opened>, state: &mut Kept) -> anyhow::Result<()> {
    state.id = event.aggregate_id.to_owned();
    state.opened = true;
    Ok(())
}

#[evento::handler]
async fn kept_deposited(event: Event<Deposited>, state: &mut Kept) -> anyhow::Result<()> {
    state.balance += event.data.amount;
    state.count += 1;
    Ok(())
}

fn plain<E: Executor>() -> Projection<E, Plain> {
    Projection::new::<Bank>().handler(plain_opened()).handler(plain_deposited()).strict()
}

fn kept<E: Executor>() -> Projection<E, Kept> {
    Projection::new::<Bank>().handler(kept_opened()).handler(kept_deposited()).strict()
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Totals>>);

#[evento::subscription]
async fn sums<E: Executor>(context: &Context<'_, E>, event: Event<Deposited>) -> anyhow::Result<()> {
    let shared: Shared = context.extract();
    let Deposited { amount, reference, .. } = &event.data;
    shared.0.lock().unwrap().add(&event.aggregate_id, *amount, reference);
    Ok(())
}

pub async fn run(workload: Workload, variant: &str, url: &str, sizes: Sizes) -> Answer {
    let options = PgPoolOptions::new().min_connections(POOL).max_connections(POOL);
    let pool = options.connect(url).await.unwrap();
    let mut connection = pool.acquire().await.unwrap();
    let migrator = evento::sql_migrator::new::<sqlx::Postgres>().unwrap();
    migrator.run(&mut *connection, &Plan::apply_all()).await.unwrap();
    drop(connection);
    let mut all = Vec::new();
    for _ in 0..POOL {
        all.push(pool.acquire().await.unwrap());
    }
    drop(all);
    let kept = variant == "snapshots";
    match workload {
        Workload::Commands => commands(pool.into(), kept, ACCOUNTS, CALLERS, sizes.commands).await,
        Workload::Hot => commands(pool.into(), kept, 1, 1, sizes.hot).await,
        Workload::Catchup => {
            let chunk = if variant == "chunks of 300" { 300 } else { 5_000 };
            catchup(pool.into(), url, chunk, sizes.catchup).await
        }
        Workload::Latency => {
            let margin = if variant == "margin 1 s" { 1_000 } else { 20 };
            let executor = evento::Postgres::from(pool).stable_margin(Duration::from_millis(margin));
            latency(executor, sizes.latency).await
        }
    }
}

async fn commands(
    executor: evento::Postgres,
    kept: bool,
    accounts: usize,
    callers: usize,
    commands: usize,
) -> Answer {
    let opening = executor.clone();
    closed_loop(CALLERS.min(accounts), accounts, move |n| {
        let executor = opening.clone();
        async move {
            let id = account(n);
            let opened = Opened { account: id.clone() };
            evento::append(&id).event(&opened).commit(&executor).await.unwrap();
        }
    })
    .await;
    let again = Arc::new(AtomicUsize::new(0));
    let retries = again.clone();
    let answer = closed_loop(callers, commands, move |n| {
        let (executor, again) = (executor.clone(), retries.clone());
        async move {
            let id = account(n % accounts);
            while let Err(error) = deposit(&executor, &id, kept).await {
                let before = again.fetch_add(1, Ordering::Relaxed);
                assert!(before < 1_000_000, "{error}");
            }
        }
    })
    .await;
    match again.load(Ordering::Relaxed) {
        0 => answer,
        again => answer.note(format!("{again} conflicts tried again")),
    }
}

async fn deposit(executor: &evento::Postgres, id: &str, in_memory: bool) -> anyhow::Result<()> {
    let event = deposited(Money::sample(id));
    let missing = || anyhow::anyhow!("not found");
    match in_memory {
        true => {
            let state = kept().load(id).execute(executor).await?.ok_or_else(missing)?;
            state.write()?.event(&event).commit(executor).await?;
        }
        false => {
            let state = plain().load(id).execute(executor).await?.ok_or_else(missing)?;
            state.write()?.event(&event).commit(executor).await?;
        }
    }
    Ok(())
}

/// The cursor is kept behind every chunk.
async fn catchup(executor: evento::Postgres, url: &str, chunk: u16, events: usize) -> Answer {
    let sample = deposited(Money::sample(&account(0)));
    evento::append(account(0)).event(&sample).commit(&executor).await.unwrap();
    // Copies of a row that it has written itself, a millisecond apart: its cursor begins with the time.
    let fill = format!(
        "INSERT INTO event SELECT (jsonb_populate_record(t, jsonb_build_object('id', lpad(i::text, 26, '0'),
            'aggregator_id', 'acct-' || lpad((i % {ACCOUNTS})::text, 7, '0'), 'version', 1 + i / {ACCOUNTS},
            'timestamp', t.timestamp - 3600 + i / 1000, 'timestamp_subsec', i % 1000))).*
         FROM template t, generate_series(0, {events} - 1) i"
    );
    sql(
        url,
        &["CREATE TABLE template AS SELECT * FROM event", "TRUNCATE event", &fill, "DROP TABLE template"],
    )
    .await;
    settle(url).await;
    // Older than the margin behind which it reads.
    tokio::time::sleep(Duration::from_millis(2_200)).await;
    let shared = Shared::default();
    let subscription = SubscriptionBuilder::new("sums").data(shared.clone()).handler(sums()).skip::<Opened>();
    let start = Instant::now();
    subscription.chunk_size(chunk).run_once(&executor).await.unwrap();
    let answer = Answer::new(events, start.elapsed(), Vec::new());
    assert_eq!(shared.0.lock().unwrap().count, events);
    answer
}

async fn latency(executor: evento::Postgres, events: usize) -> Answer {
    let shared = Shared::default();
    let subscription = SubscriptionBuilder::new("sums").data(shared.clone()).handler(sums()).skip::<Opened>();
    let subscription = subscription.start(&executor).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut ticks = tokio::time::interval(EVERY);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..events {
        ticks.tick().await;
        let executor = executor.clone();
        tasks.spawn(async move {
            let event = deposited(Money::stamped(&account(n)));
            evento::append(account(n)).event(&event).commit(&executor).await.unwrap();
        });
    }
    tasks.join_all().await;
    wait_until(events, || shared.0.lock().unwrap().count).await;
    drop(subscription.shutdown().await);
    let ages = std::mem::take(&mut shared.0.lock().unwrap().ages);
    Answer::latencies(ages, events)
}
