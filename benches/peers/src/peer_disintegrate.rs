//! disintegrate and disintegrate-postgres: `DecisionMaker::make`, and `PgEventListener` for projections.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use disintegrate::serde::json::Json;
use disintegrate::{
    Decision, DecisionError, Event, EventListener, EventStore as _, NoSnapshot, PersistedEvent, StateMutate,
    StateQuery, StreamQuery, WithSnapshot, query,
};
use disintegrate_postgres::{
    PgDecisionMaker, PgEventId, PgEventListener, PgEventListenerConfig, PgEventStore, PgSnapshotter,
    decision_maker,
};
use serde::{Deserialize, Serialize};
use sqlx8::Row;
use sqlx8::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::*;
use crate::peer_cqrs_es::pool;
use crate::{Sizes, Workload};

#[derive(Debug, Clone, PartialEq, Eq, Event, Serialize, Deserialize)]
#[stream(AccountEvent, [Opened, Deposited])]
enum DomainEvent {
    Opened {
        #[id]
        account: String,
    },
    Deposited {
        #[id]
        account: String,
        amount: i64,
        currency: String,
        reference: String,
        memo: String,
    },
}

fn deposited(money: Money) -> DomainEvent {
    let Money { account, amount, currency, reference, memo } = money;
    DomainEvent::Deposited { account, amount, currency, reference, memo }
}

#[derive(Default, StateQuery, Clone, Debug, Serialize, Deserialize)]
#[state_query(AccountEvent)]
struct Account {
    #[id]
    account: String,
    state: Balance,
}

impl StateMutate for Account {
    fn mutate(&mut self, event: Self::Event) {
        match event {
            AccountEvent::Opened { .. } => self.state.opened = true,
            AccountEvent::Deposited { amount, .. } => {
                self.state.balance += amount;
                self.state.count += 1;
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("refused")]
struct Refused;

struct Open(String);

impl Decision for Open {
    type Event = DomainEvent;
    type StateQuery = Account;
    type Error = Refused;

    fn state_query(&self) -> Account {
        Account { account: self.0.clone(), state: Balance::default() }
    }

    fn process(&self, account: &Account) -> Result<Vec<DomainEvent>, Refused> {
        match account.state.opened {
            true => Err(Refused),
            false => Ok(vec![DomainEvent::Opened { account: self.0.clone() }]),
        }
    }
}

struct Deposit(String);

impl Decision for Deposit {
    type Event = DomainEvent;
    type StateQuery = Account;
    type Error = Refused;

    fn state_query(&self) -> Account {
        Account { account: self.0.clone(), state: Balance::default() }
    }

    fn process(&self, account: &Account) -> Result<Vec<DomainEvent>, Refused> {
        match account.state.opened {
            true => Ok(vec![deposited(Money::sample(&self.0))]),
            false => Err(Refused),
        }
    }
}

struct Sums {
    query: StreamQuery<PgEventId, DomainEvent>,
    totals: Arc<Mutex<Totals>>,
}

#[async_trait::async_trait]
impl EventListener<PgEventId, DomainEvent> for Sums {
    type Error = Refused;

    fn id(&self) -> &'static str {
        "sums"
    }

    fn query(&self) -> &StreamQuery<PgEventId, DomainEvent> {
        &self.query
    }

    async fn handle(&self, event: PersistedEvent<PgEventId, DomainEvent>) -> Result<(), Refused> {
        if let DomainEvent::Deposited { account, amount, reference, .. } = event.into_inner() {
            self.totals.lock().unwrap().add(&account, amount, &reference);
        }
        Ok(())
    }
}

type Store = PgEventStore<DomainEvent, Json<DomainEvent>>;

pub async fn run(workload: Workload, variant: &str, url: &str, sizes: Sizes) -> Answer {
    let pool = pool(url).await;
    let store = store(&pool, url).await;
    match (workload, variant) {
        (Workload::Commands, _) => {
            commands(decision_maker(store, NoSnapshot), ACCOUNTS, CALLERS, sizes.commands).await
        }
        (Workload::Hot, "snapshots") => {
            let snapshots = WithSnapshot::new(PgSnapshotter::try_new(pool, 10).await.unwrap());
            commands(decision_maker(store, snapshots), 1, 1, sizes.hot).await
        }
        (Workload::Hot, _) => commands(decision_maker(store, NoSnapshot), 1, 1, sizes.hot).await,
        (Workload::Catchup, _) => catchup(store, url, sizes.catchup).await,
        (Workload::Latency, _) => latency(store, sizes.latency).await,
    }
}

/// Its migration has a number (`0xFFFFFFFF`) that PostgreSQL reads from version 16 on. On an older one its functions are made
/// unchecked, and that of the number again, in decimal.
async fn store(pool: &PgPool, url: &str) -> Store {
    let options: PgConnectOptions = url.parse().unwrap();
    let options = options.options([("check_function_bodies", "off")]);
    let migrating = PgPoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
    Store::try_new(migrating.clone(), Json::default()).await.unwrap();
    let begin = "SELECT pg_get_functiondef('event_store_begin_epoch'::regproc)";
    let definition: String = sqlx8::query(begin).fetch_one(&migrating).await.unwrap().get(0);
    sqlx8::query(&definition.replace("0xFFFFFFFF", "4294967295")).execute(&migrating).await.unwrap();
    migrating.close().await;
    Store::new_uninitialized(pool.clone(), Json::default())
}

/// Tried again at once on a conflict: its own documentation leaves that to the caller.
macro_rules! make {
    ($maker:expr, $decision:expr, $again:expr) => {
        loop {
            match $maker.make($decision).await {
                Ok(_) => break,
                Err(DecisionError::Domain(refused)) => panic!("{refused}"),
                Err(_) => drop($again.fetch_add(1, Ordering::Relaxed)),
            }
        }
    };
}

async fn commands<M>(maker: M, accounts: usize, callers: usize, commands: usize) -> Answer
where
    M: Maker + Clone + Send + Sync + 'static,
{
    let again = Arc::new(AtomicUsize::new(0));
    let (opening, retries) = (maker.clone(), again.clone());
    closed_loop(CALLERS.min(accounts), accounts, move |n| {
        let (maker, again) = (opening.clone(), retries.clone());
        async move { maker.open(account(n), &again).await }
    })
    .await;
    again.store(0, Ordering::Relaxed);
    let retries = again.clone();
    let answer = closed_loop(callers, commands, move |n| {
        let (maker, again) = (maker.clone(), retries.clone());
        async move { maker.deposit(account(n % accounts), &again).await }
    })
    .await;
    match again.load(Ordering::Relaxed) {
        0 => answer,
        again => answer.note(format!("{again} conflicts tried again")),
    }
}

/// Either kind of decision maker.
trait Maker {
    fn open(&self, account: String, again: &AtomicUsize) -> impl Future<Output = ()> + Send;
    fn deposit(&self, account: String, again: &AtomicUsize) -> impl Future<Output = ()> + Send;
}

macro_rules! maker {
    ($snapshots:ty) => {
        impl Maker for PgDecisionMaker<DomainEvent, Json<DomainEvent>, $snapshots> {
            async fn open(&self, account: String, again: &AtomicUsize) {
                make!(self, Open(account.clone()), again);
            }

            async fn deposit(&self, account: String, again: &AtomicUsize) {
                make!(self, Deposit(account.clone()), again);
            }
        }
    };
}

maker!(NoSnapshot);
maker!(disintegrate_postgres::WithPgSnapshot);

/// One query and one transaction; the cursor is kept once, at the end.
async fn catchup(store: Store, url: &str, events: usize) -> Answer {
    let payload = serde_json::to_string(&deposited(Money::sample("@"))).unwrap();
    let fill = format!(
        "INSERT INTO event (event_type, payload, account)
         SELECT 'Deposited', convert_to(replace('{payload}', '@', a), 'UTF8'), a
         FROM (SELECT 'acct-' || lpad((i % {ACCOUNTS})::text, 7, '0') a FROM generate_series(0, {events} - 1) i) x"
    );
    sql(url, &[&fill]).await;
    settle(url).await;
    let totals = Arc::new(Mutex::new(Totals::default()));
    let sums = Sums { query: query!(DomainEvent), totals: totals.clone() };
    let config = PgEventListenerConfig::poller(Duration::from_millis(50));
    let start = Instant::now();
    // It ends with the process: what it spawns outlives an abort.
    tokio::spawn(PgEventListener::builder(store).register_listener(sums, config).start());
    while totals.lock().unwrap().count < events {
        assert!(start.elapsed() < Duration::from_secs(300), "it did not get there");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Answer::new(events, start.elapsed(), Vec::new())
}

async fn latency(store: Store, events: usize) -> Answer {
    let totals = Arc::new(Mutex::new(Totals::default()));
    let sums = Sums { query: query!(DomainEvent), totals: totals.clone() };
    let config = PgEventListenerConfig::poller(Duration::from_secs(5)).fetch_size(100).with_notifier();
    tokio::spawn(PgEventListener::builder(store.clone()).register_listener(sums, config).start());
    // It does not say when it listens.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut ticks = tokio::time::interval(EVERY);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..events {
        ticks.tick().await;
        let store = store.clone();
        tasks.spawn(async move {
            let event = deposited(Money::stamped(&account(n)));
            store.append_without_validation(vec![event]).await.unwrap();
        });
    }
    tasks.join_all().await;
    wait_until(events, || totals.lock().unwrap().count).await;
    let ages = std::mem::take(&mut totals.lock().unwrap().ages);
    Answer::latencies(ages, events)
}
