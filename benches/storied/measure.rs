use std::fmt;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::args::Plan;

/// What one side did in one run.
pub struct Run {
    operations: usize,
    elapsed: Duration,
    /// One for each operation that somebody waited for.
    latencies: Vec<Duration>,
}

/// Both sides of one run.
pub struct Comparison {
    pub ours: Run,
    pub limit: Run,
    pub note: String,
}

impl Run {
    pub fn new(operations: usize, elapsed: Duration, latencies: Vec<Duration>) -> Self {
        Self { operations, elapsed, latencies }
    }

    /// A run of one long operation over `operations` things.
    pub fn whole(operations: usize, elapsed: Duration) -> Self {
        Self::new(operations, elapsed, vec![elapsed])
    }

    fn per_second(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }
}

/// `callers` tasks share `operations` between them; each waits for one before it begins the next.
pub async fn closed_loop<F>(callers: usize, operations: usize, operation: impl Fn(usize) -> F) -> Run
where
    F: Future<Output = ()> + Send + 'static,
    F: 'static,
{
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for caller in 0..callers {
        let operations: Vec<F> = (caller..operations).step_by(callers).map(&operation).collect();
        tasks.spawn(async move {
            let mut latencies = Vec::with_capacity(operations.len());
            for operation in operations {
                let start = Instant::now();
                operation.await;
                latencies.push(start.elapsed());
            }
            latencies
        });
    }
    let latencies = tasks.join_all().await.concat();
    Run::new(operations, start.elapsed(), latencies)
}

#[derive(Clone, Copy)]
struct Side {
    per_second: f64,
    p50: f64,
    p99: f64,
}

pub struct Report {
    plan: Plan,
    ours: Side,
    limit: Side,
    /// Median of the runs' ratios of ours to the limit, by throughput.
    ratio: f64,
    spread: [f64; 2],
    note: String,
}

impl Report {
    pub fn new(plan: &Plan, comparisons: &[Comparison]) -> Self {
        let ratios: Vec<_> =
            comparisons.iter().map(|one| one.ours.per_second() / one.limit.per_second()).collect();
        Self {
            plan: plan.clone(),
            ours: side(comparisons.iter().map(|one| &one.ours)),
            limit: side(comparisons.iter().map(|one| &one.limit)),
            ratio: median(ratios.clone()),
            spread: [
                ratios.iter().copied().fold(f64::INFINITY, f64::min),
                ratios.iter().copied().fold(0.0, f64::max),
            ],
            note: comparisons.last().map(|one| one.note.clone()).unwrap_or_default(),
        }
    }

    pub fn json(&self) -> Value {
        let side =
            |side: Side| json!({"per_second": side.per_second, "p50_us": side.p50, "p99_us": side.p99});
        json!({
            "workload": self.plan.workload.name(),
            "store": self.plan.store.name(),
            "bus": self.plan.workload.bus(),
            "callers": self.plan.callers,
            "events": self.plan.events,
            "runs": self.plan.runs,
            "ours": side(self.ours),
            "limit": side(self.limit),
            "ratio": self.ratio,
            "spread": self.spread,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { workload, store, callers, events, runs, .. } = &self.plan;
        writeln!(
            f,
            "{} on {}: {callers} callers, {events} events, {runs} runs",
            workload.name(),
            store.name()
        )?;
        for (name, side) in [("ours", self.ours), ("limit", self.limit)] {
            writeln!(
                f,
                "  {name:<6} {:>12.0}/s   p50 {:>9.0} us   p99 {:>9.0} us",
                side.per_second, side.p50, side.p99
            )?;
        }
        writeln!(
            f,
            "  ratio  {:.2}  [{:.2}..{:.2}]   {}",
            self.ratio, self.spread[0], self.spread[1], self.note
        )
    }
}

fn side<'a>(runs: impl Iterator<Item = &'a Run> + Clone) -> Side {
    let percentile = |percent: usize| {
        median(
            runs.clone()
                .map(|run| {
                    let mut latencies = run.latencies.clone();
                    latencies.sort_unstable();
                    let index = (latencies.len() * percent / 100).min(latencies.len() - 1);
                    latencies[index].as_secs_f64() * 1e6
                })
                .collect(),
        )
    };
    Side {
        per_second: median(runs.clone().map(Run::per_second).collect()),
        p50: percentile(50),
        p99: percentile(99),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
