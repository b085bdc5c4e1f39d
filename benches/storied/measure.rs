use std::fmt;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::args::Plan;

/// The result of one side in one run.
pub struct Run {
    /// Operations per second; bytes or nanoseconds in workloads that measure a cost.
    figure: f64,
    /// Latency of each operation with a waiting caller.
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
        Self { figure: operations as f64 / elapsed.as_secs_f64(), latencies }
    }

    /// Returns the run of one long operation over `operations` items.
    pub fn whole(operations: usize, elapsed: Duration) -> Self {
        Self::new(operations, elapsed, vec![elapsed])
    }

    /// Returns the run of sequential operations with their latencies.
    ///
    /// The rate is the inverse of the mean.
    pub fn each(latencies: Vec<Duration>) -> Self {
        Self::new(latencies.len(), latencies.iter().sum(), latencies)
    }

    /// Converts the rate to events, for operations with this many events each.
    pub fn of(self, events: usize) -> Self {
        Self { figure: self.figure * events as f64, ..self }
    }

    /// Returns a cost for which less is better.
    pub fn nanoseconds(cost: f64) -> Self {
        Self { figure: cost, latencies: Vec::new() }
    }

    pub fn bytes(bytes: f64) -> Self {
        Self { figure: bytes, latencies: Vec::new() }
    }
}

/// Runs `operations` in `callers` tasks; each task waits for one operation before the next.
pub async fn closed_loop<F>(callers: usize, operations: usize, operation: impl Fn(usize) -> F) -> Run
where
    F: Future<Output = ()> + Send + 'static,
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
    /// As in [`Run`].
    figure: f64,
    /// In microseconds; none without waiting callers.
    p50: Option<f64>,
    p99: Option<f64>,
}

pub struct Report {
    plan: Plan,
    ours: Side,
    limit: Side,
    /// Median of the ratios of storied to the limit.
    ratio: f64,
    spread: [f64; 2],
    note: String,
}

impl Report {
    pub fn new(plan: &Plan, comparisons: &[Comparison]) -> Self {
        let ratios: Vec<_> = comparisons.iter().map(|one| one.ours.figure / one.limit.figure).collect();
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

    /// Returns the result as JSON.
    ///
    /// In memory workloads `per_second` is bytes, and the percentiles are null.
    pub fn json(&self) -> Value {
        let side = |side: Side| json!({"per_second": side.figure, "p50_us": side.p50, "p99_us": side.p99});
        json!({
            "workload": self.plan.workload.name(),
            "store": self.plan.store.name(),
            "bus": self.plan.bus.name(),
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
        let Plan { workload, store, bus, callers, events, runs, .. } = &self.plan;
        let (workload, store, bus) = (workload.name(), store.name(), bus.name());
        writeln!(f, "{workload} on {store} over {bus}: {callers} callers, {events} events, {runs} runs")?;
        for (name, side) in [("ours", self.ours), ("limit", self.limit)] {
            match (side.p50, side.p99) {
                (Some(p50), Some(p99)) => {
                    let rate = side.figure;
                    writeln!(f, "  {name:<6} {rate:>12.0}/s   p50 {p50:>9.0} us   p99 {p99:>9.0} us")?;
                }
                _ => writeln!(f, "  {name:<6} {:>12.0} {}", side.figure, unit(&workload))?,
            }
        }
        let [least, most] = self.spread;
        writeln!(f, "  ratio  {:.2}  [{least:.2}..{most:.2}]   {}", self.ratio, self.note)
    }
}

/// Returns the unit of a figure without latencies.
fn unit(workload: &str) -> &'static str {
    if workload.starts_with("cpu-") { "ns" } else { "bytes" }
}

/// Returns the results of `--json` files as a table in Markdown.
pub fn table(files: &[String]) -> String {
    let mut table = String::from(
        "| workload | store | bus | callers | ours | limit | ratio [runs] | p50 ours / limit | p99 ours / limit |\n\
         |---|---|---|---:|---:|---:|---|---:|---:|\n",
    );
    for file in files {
        let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"));
        let rows = match serde_json::from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}")) {
            Value::Array(rows) => rows,
            row => vec![row],
        };
        for row in rows {
            table += &line(&row);
        }
    }
    table
}

fn line(row: &Value) -> String {
    let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let [ours, limit] = ["ours", "limit"].map(|side| &row[side]);
    let figure = |side: &Value| match side["p50_us"].is_null() {
        true => format!(
            "{} {}",
            thousands(side["per_second"].as_f64().unwrap_or_default()),
            unit(row["workload"].as_str().unwrap_or_default())
        ),
        false => format!("{}/s", thousands(side["per_second"].as_f64().unwrap_or_default())),
    };
    let both = |key: &str| match (ours[key].as_f64(), limit[key].as_f64()) {
        (Some(ours), Some(limit)) => format!("{} / {}", duration(ours), duration(limit)),
        _ => String::new(),
    };
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    format!(
        "| {} | {} | {} | {} | {} | {} | **{:.2}** [{:.2}..{:.2}] | {} | {} |\n",
        text("workload"),
        text("store"),
        text("bus"),
        row["callers"],
        figure(ours),
        figure(limit),
        number(&row["ratio"]),
        number(&row["spread"][0]),
        number(&row["spread"][1]),
        both("p50_us"),
        both("p99_us")
    )
}

fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

fn duration(microseconds: f64) -> String {
    match microseconds {
        ..1_000.0 => format!("{microseconds:.0} µs"),
        ..1_000_000.0 => format!("{:.1} ms", microseconds / 1e3),
        _ => format!("{:.1} s", microseconds / 1e6),
    }
}

fn side<'a>(runs: impl Iterator<Item = &'a Run> + Clone) -> Side {
    let percentile = |percent: usize| {
        let each = runs.clone().filter(|run| !run.latencies.is_empty()).map(|run| {
            let mut latencies = run.latencies.clone();
            latencies.sort_unstable();
            let index = (latencies.len() * percent / 100).min(latencies.len() - 1);
            latencies[index].as_secs_f64() * 1e6
        });
        let each: Vec<_> = each.collect();
        (!each.is_empty()).then(|| median(each))
    };
    Side {
        figure: median(runs.clone().map(|run| run.figure).collect()),
        p50: percentile(50),
        p99: percentile(99),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
