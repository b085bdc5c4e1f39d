//! cqrs-es and postgres-es: `CqrsFramework::execute`, as its user guide has it.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use cqrs_es::event_sink::EventSink;
use cqrs_es::persist::QueryReplay;
use cqrs_es::{Aggregate, AggregateError, DomainEvent, EventEnvelope, Query};
use postgres_es::{PostgresCqrs, PostgresEventRepository, postgres_cqrs, postgres_snapshot_cqrs};
use serde::{Deserialize, Serialize};
use sqlx8::postgres::{PgPool, PgPoolOptions};

use crate::common::*;
use crate::{Sizes, Workload};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum AccountEvent {
    Opened { account: String },
    Deposited(Money),
}

impl DomainEvent for AccountEvent {
    fn event_type(&self) -> String {
        match self {
            AccountEvent::Opened { .. } => "Opened".into(),
            AccountEvent::Deposited(_) => "Deposited".into(),
        }
    }

    fn event_version(&self) -> String {
        "1.0".into()
    }
}

enum AccountCommand {
    Open(String),
    Deposit(Money),
}

#[derive(Debug, thiserror::Error)]
#[error("refused")]
struct Refused;

#[derive(Default, Serialize, Deserialize)]
struct Account(Balance);

impl Aggregate for Account {
    const TYPE: &'static str = "account";
    type Command = AccountCommand;
    type Event = AccountEvent;
    type Error = Refused;
    type Services = ();

    async fn handle(
        &mut self,
        command: AccountCommand,
        (): &(),
        sink: &EventSink<Self>,
    ) -> Result<(), Refused> {
        let event = match command {
            AccountCommand::Open(account) if !self.0.opened => AccountEvent::Opened { account },
            AccountCommand::Deposit(money) if self.0.opened && money.amount > 0 => {
                AccountEvent::Deposited(money)
            }
            _ => return Err(Refused),
        };
        sink.write(event, self).await;
        Ok(())
    }

    fn apply(&mut self, event: AccountEvent) {
        match event {
            AccountEvent::Opened { .. } => self.0.opened = true,
            AccountEvent::Deposited(money) => {
                self.0.balance += money.amount;
                self.0.count += 1;
            }
        }
    }
}

struct Sums(Arc<Mutex<Totals>>);

#[async_trait::async_trait]
impl Query<Account> for Sums {
    async fn dispatch(&self, _: &str, events: &[EventEnvelope<Account>]) {
        let mut totals = self.0.lock().unwrap();
        for event in events {
            if let AccountEvent::Deposited(money) = &event.payload {
                totals.add(&money.account, money.amount, &money.reference);
            }
        }
    }
}

/// The tables that its documentation asks for.
const TABLES: [&str; 2] = [
    "CREATE TABLE events (aggregate_type text NOT NULL, aggregate_id text NOT NULL, sequence bigint NOT NULL
     CHECK (sequence >= 0), event_type text NOT NULL, event_version text NOT NULL, payload json NOT NULL,
     metadata json NOT NULL, PRIMARY KEY (aggregate_type, aggregate_id, sequence))",
    "CREATE TABLE snapshots (aggregate_type text NOT NULL, aggregate_id text NOT NULL, last_sequence bigint NOT NULL
     CHECK (last_sequence >= 0), current_snapshot bigint NOT NULL CHECK (current_snapshot >= 0), payload json NOT NULL,
     PRIMARY KEY (aggregate_type, aggregate_id, last_sequence))",
];

pub async fn run(workload: Workload, variant: &str, url: &str, sizes: Sizes) -> Answer {
    sql(url, &TABLES).await;
    let pool = pool(url).await;
    let framework = match variant {
        "snapshots" => postgres_snapshot_cqrs::<Account>(pool.clone(), vec![], 100, ()),
        _ => postgres_cqrs::<Account>(pool.clone(), vec![], ()),
    };
    match workload {
        Workload::Commands => commands(framework, ACCOUNTS, CALLERS, sizes.commands).await,
        Workload::Hot => commands(framework, 1, 1, sizes.hot).await,
        Workload::Catchup => catchup(pool, url, sizes.catchup).await,
        Workload::Latency => unreachable!("its queries run within the command"),
    }
}

/// All connections, open before the clock runs.
pub async fn pool(url: &str) -> PgPool {
    let options = PgPoolOptions::new().min_connections(POOL).max_connections(POOL);
    let pool = options.connect(url).await.unwrap();
    let mut all = Vec::new();
    for _ in 0..POOL {
        all.push(pool.acquire().await.unwrap());
    }
    pool
}

async fn commands(
    framework: PostgresCqrs<Account>,
    accounts: usize,
    callers: usize,
    commands: usize,
) -> Answer {
    let framework = Arc::new(framework);
    let opening = framework.clone();
    closed_loop(CALLERS.min(accounts), accounts, move |n| {
        let framework = opening.clone();
        async move { framework.execute(&account(n), AccountCommand::Open(account(n))).await.unwrap() }
    })
    .await;
    closed_loop(callers, commands, move |n| {
        let framework = framework.clone();
        async move {
            let id = account(n % accounts);
            loop {
                match framework.execute(&id, AccountCommand::Deposit(Money::sample(&id))).await {
                    Ok(()) => break,
                    Err(AggregateError::AggregateConflict) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
        }
    })
    .await
}

/// Read by aggregate, not by a position of the log, and nothing is kept of how far it got.
async fn catchup(pool: PgPool, url: &str, events: usize) -> Answer {
    let payload = serde_json::to_string(&AccountEvent::Deposited(Money::sample("@"))).unwrap();
    let fill = format!(
        "INSERT INTO events SELECT 'account', a, s, 'Deposited', '1.0', replace('{payload}', '@', a)::json, '{{}}'
         FROM (SELECT 'acct-' || lpad((i % {ACCOUNTS})::text, 7, '0') a, 1 + i / {ACCOUNTS} s
               FROM generate_series(0, {events} - 1) i) x"
    );
    sql(url, &[&fill]).await;
    settle(url).await;
    let totals = Arc::new(Mutex::new(Totals::default()));
    let repository = PostgresEventRepository::new(pool);
    let mut replay = QueryReplay::<_, _, Account>::new(repository, Sums(totals.clone()));
    replay.use_error_handler(Box::new(|error| panic!("{error}")));
    let start = Instant::now();
    replay.replay_all().await.unwrap();
    let answer = Answer::new(events, start.elapsed(), Vec::new());
    assert_eq!(totals.lock().unwrap().count, events);
    answer
}
