//! storied: one runtime on `PostgresStore`, as the README has it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use storied::projection::{
    ApplyError, AtLeastOnce, Delivery, InMemory, Projection, ProjectionOptions, Start,
};
use storied::store::{Append, ExpectedVersion};
use storied::{
    Aggregate, Context, Decided, Event, EventStore, Metadata, NewEvent, PostgresOptions, PostgresStore,
    RecordedEvent, Runtime, StreamId,
};

use crate::common::*;
use crate::{Sizes, Workload};

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AccountEvent {
    Opened { account: String },
    Deposited(Money),
}

impl Event for AccountEvent {
    const CATEGORY: &'static str = "account";
}

#[derive(Serialize, Deserialize)]
enum AccountCommand {
    Open(String),
    Deposit(Money),
}

#[derive(Debug, Serialize, Deserialize, thiserror::Error)]
#[error("refused")]
struct Refused;

#[derive(Default)]
struct Account(Balance);

impl Aggregate for Account {
    type Event = AccountEvent;
    type Command = AccountCommand;
    type Reply = ();
    type Error = Refused;

    fn handle(&self, command: &AccountCommand, _: &Context<'_>) -> Decided<Self> {
        let event = match command {
            AccountCommand::Open(account) if !self.0.opened => {
                AccountEvent::Opened { account: account.clone() }
            }
            AccountCommand::Deposit(money) if self.0.opened && money.amount > 0 => {
                AccountEvent::Deposited(money.clone())
            }
            _ => return Err(Refused),
        };
        Ok(event.into())
    }

    fn apply(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Opened { .. } => self.0.opened = true,
            AccountEvent::Deposited(money) => {
                self.0.balance += money.amount;
                self.0.count += 1;
            }
        }
    }
}

/// In memory, on every node.
struct Sums(Arc<Mutex<Totals>>);

impl Projection for Sums {
    const NAME: &'static str = "sums";
    type Event = AccountEvent;
    type Transaction = ();

    async fn apply(&mut self, event: AccountEvent, _: &RecordedEvent, (): &mut ()) -> Result<(), ApplyError> {
        add(&self.0, event)
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), ApplyError> {
        *self.0.lock().map_err(|_| "poisoned")? = Totals::default();
        Ok(())
    }
}

/// With a checkpoint in the event store.
struct KeptSums(Arc<Mutex<Totals>>);

impl Projection for KeptSums {
    const NAME: &'static str = "sums";
    type Event = AccountEvent;
    type Transaction = Delivery;

    async fn apply(
        &mut self,
        event: AccountEvent,
        _: &RecordedEvent,
        _: &mut Delivery,
    ) -> Result<(), ApplyError> {
        add(&self.0, event)
    }
}

fn add(totals: &Mutex<Totals>, event: AccountEvent) -> Result<(), ApplyError> {
    if let AccountEvent::Deposited(money) = event {
        totals.lock().unwrap().add(&money.account, money.amount, &money.reference);
    }
    Ok(())
}

pub async fn run(workload: Workload, variant: &str, url: &str, sizes: Sizes) -> Answer {
    let store = PostgresOptions::new().url(url).max_connections(POOL).connect().await.unwrap();
    match workload {
        Workload::Commands => commands(store, ACCOUNTS, CALLERS, sizes.commands).await,
        Workload::Hot => commands(store, 1, 1, sizes.hot).await,
        Workload::Catchup => catchup(store, variant == "checkpoint", url, sizes.catchup).await,
        Workload::Latency => latency(store, sizes.latency).await,
    }
}

async fn commands(store: PostgresStore, accounts: usize, callers: usize, commands: usize) -> Answer {
    let runtime = Runtime::builder().store(store).aggregate::<Account>().start().await.unwrap();
    open(&runtime, accounts).await;
    let deposit = {
        let runtime = runtime.clone();
        move |n: usize| {
            let (runtime, id) = (runtime.clone(), account(n % accounts));
            let deposit = AccountCommand::Deposit(Money::sample(&id));
            async move { drop(runtime.execute::<Account>(id, deposit).await.unwrap()) }
        }
    };
    let answer = closed_loop(callers, commands, deposit).await;
    runtime.shutdown().await.unwrap();
    answer
}

async fn open(runtime: &Runtime, accounts: usize) {
    let runtime = runtime.clone();
    closed_loop(CALLERS.min(accounts), accounts, move |n| {
        let (runtime, id) = (runtime.clone(), account(n));
        async move {
            let open = AccountCommand::Open(id.clone());
            drop(runtime.execute::<Account>(id, open).await.unwrap());
        }
    })
    .await;
}

async fn catchup(store: PostgresStore, kept: bool, url: &str, events: usize) -> Answer {
    let codec = store.info().codec;
    let all: Vec<usize> = (0..events).collect();
    for batch in all.chunks(500) {
        let append = |n: &usize| {
            let id = account(n % ACCOUNTS);
            let event = AccountEvent::Deposited(Money::sample(&id));
            let new = NewEvent::encode(&event, codec, &Metadata::default()).unwrap();
            Append::one(StreamId::new("account", id).unwrap(), ExpectedVersion::Any, vec![new])
        };
        for answer in store.append(batch.iter().map(append).collect()).await {
            answer.unwrap();
        }
    }
    settle(url).await;
    let head = store.high_water_mark().await.unwrap();
    let totals = Arc::new(Mutex::new(Totals::default()));
    let builder = Runtime::builder().store(store);
    let builder = match kept {
        true => {
            let options = ProjectionOptions::new().start(Start::Beginning);
            builder.projection_with(KeptSums(totals.clone()), AtLeastOnce::new(), options)
        }
        false => builder.projection(Sums(totals.clone()), InMemory::new()),
    };
    let start = Instant::now();
    let runtime = builder.start().await.unwrap();
    let sums = runtime.projection("sums").unwrap();
    sums.caught_up_to_within(head, Duration::from_secs(300)).await.unwrap();
    let answer = Answer::new(events, start.elapsed(), Vec::new());
    assert_eq!(totals.lock().unwrap().count, events);
    runtime.shutdown().await.unwrap();
    answer
}

async fn latency(store: PostgresStore, events: usize) -> Answer {
    let totals = Arc::new(Mutex::new(Totals::default()));
    let runtime = Runtime::builder()
        .store(store)
        .aggregate::<Account>()
        .projection(Sums(totals.clone()), InMemory::new())
        .start()
        .await
        .unwrap();
    runtime.projection("sums").unwrap().wait_until_caught_up(Duration::from_secs(30)).await.unwrap();
    open(&runtime, ACCOUNTS).await;
    let mut ticks = tokio::time::interval(EVERY);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..events {
        ticks.tick().await;
        let (runtime, id) = (runtime.clone(), account(n % ACCOUNTS));
        tasks.spawn(async move {
            let deposit = AccountCommand::Deposit(Money::stamped(&id));
            drop(runtime.execute::<Account>(id, deposit).await.unwrap());
        });
    }
    tasks.join_all().await;
    wait_until(events, || totals.lock().unwrap().count).await;
    runtime.shutdown().await.unwrap();
    let ages = std::mem::take(&mut totals.lock().unwrap().ages);
    Answer::latencies(ages, events)
}
