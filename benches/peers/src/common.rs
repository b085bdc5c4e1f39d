//! What every side shares: the event, the account, the loop and the answer.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sqlx::{Connection, Executor, PgConnection};

/// Connections of each side's pool: 16 was the better of 16 and 64 for every peer on two cores.
pub const POOL: u32 = 16;

pub const ACCOUNTS: usize = 1_000;
pub const CALLERS: usize = 64;

/// How often an event is appended while latencies are taken.
pub const EVERY: Duration = Duration::from_millis(5);

/// The event that every workload writes: 165 bytes as JSON, 179 with the name of an enum's variant around it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Money {
    pub account: String,
    pub amount: i64,
    pub currency: String,
    pub reference: String,
    pub memo: String,
}

impl Money {
    pub fn sample(account: &str) -> Self {
        Self {
            account: account.into(),
            amount: 10,
            currency: "EUR".into(),
            reference: "0191f3c2-7b1e-7a44-9d3e-5f6a7b8c9d0e".into(),
            memo: "standing order, rent for the flat in the old town".into(),
        }
    }

    /// Says when it was made.
    pub fn stamped(account: &str) -> Self {
        Self { reference: format!("t:{:034}", nanoseconds()), ..Self::sample(account) }
    }
}

/// How long ago a stamped event was made.
pub fn age(reference: &str) -> Option<Duration> {
    let made: u64 = reference.strip_prefix("t:")?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds().saturating_sub(made)))
}

fn nanoseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

pub fn account(n: usize) -> String {
    format!("acct-{n:07}")
}

/// The state on every side.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    pub opened: bool,
    pub balance: i64,
    pub count: u64,
}

/// The projection on every side: in memory.
#[derive(Debug, Default)]
pub struct Totals {
    pub count: usize,
    pub by_account: HashMap<String, i64>,
    pub ages: Vec<Duration>,
}

impl Totals {
    pub fn add(&mut self, account: &str, amount: i64, reference: &str) {
        self.count += 1;
        match self.by_account.get_mut(account) {
            Some(sum) => *sum += amount,
            None => drop(self.by_account.insert(account.into(), amount)),
        }
        self.ages.extend(age(reference));
    }
}

/// What one run of one side answers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Answer {
    pub per_second: f64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    /// What a reader has to know, if anything.
    pub note: String,
}

impl Answer {
    pub fn new(operations: usize, elapsed: Duration, mut latencies: Vec<Duration>) -> Self {
        latencies.sort_unstable();
        let percentile = |percent: usize| {
            let index = (latencies.len() * percent / 100).min(latencies.len().saturating_sub(1));
            latencies.get(index).map(|latency| latency.as_secs_f64() * 1e6)
        };
        Self {
            per_second: operations as f64 / elapsed.as_secs_f64(),
            p50_us: percentile(50),
            p99_us: percentile(99),
            note: String::new(),
        }
    }

    /// Of what reached the handler, out of `sent`.
    pub fn latencies(ages: Vec<Duration>, sent: usize) -> Self {
        let mean = ages.iter().sum::<Duration>();
        let note = match ages.len() {
            seen if seen == sent => String::new(),
            seen => format!("{seen} of {sent} seen; percentiles are of these"),
        };
        Self { note, ..Self::new(ages.len(), mean, ages) }
    }

    pub fn note(self, note: impl Into<String>) -> Self {
        Self { note: note.into(), ..self }
    }
}

/// `callers` tasks; each takes the next number when it has done one.
pub async fn closed_loop<F, O>(callers: usize, operations: usize, operation: F) -> Answer
where
    F: Fn(usize) -> O + Send + Sync + 'static,
    O: Future<Output = ()> + Send,
{
    let (operation, next) = (Arc::new(operation), Arc::new(AtomicUsize::new(0)));
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..callers {
        let (operation, next) = (operation.clone(), next.clone());
        tasks.spawn(async move {
            let mut latencies = Vec::new();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= operations {
                    return latencies;
                }
                let start = Instant::now();
                operation(n).await;
                latencies.push(start.elapsed());
            }
        });
    }
    let latencies = tasks.join_all().await.concat();
    Answer::new(operations, start.elapsed(), latencies)
}

/// Until `seen` has come to `all`, or it takes too long.
pub async fn wait_until(all: usize, seen: impl Fn() -> usize) {
    let start = Instant::now();
    while seen() < all && start.elapsed() < Duration::from_secs(15) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Runs statements, one after the other.
pub async fn sql(url: &str, statements: &[&str]) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    for statement in statements {
        connection
            .execute(sqlx::AssertSqlSafe(*statement))
            .await
            .unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
    connection.close().await.unwrap();
}

/// After a full log was made by other means than the side's own.
pub async fn settle(url: &str) {
    sql(url, &["VACUUM ANALYZE", "CHECKPOINT"]).await;
}
