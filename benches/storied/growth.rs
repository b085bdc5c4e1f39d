//! What an event costs while the log grows: `cargo bench --bench storied -- growth MILLIONS`.
//!
//! Fills an empty PostgreSQL store through `append`, then a table with the same columns and indexes
//! by `INSERT … unnest`. Each of 30 parts is one row of the table: rate, WAL, CPU time of the server
//! and disk space.

use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use sqlx::{AssertSqlSafe, Executor, PgConnection, Row};
use storied::store::{Append, ExpectedVersion};
use storied::{Metadata, NewEvent, StreamId, Version};
use tokio::task::JoinSet;

use crate::args::StoreKind;
use crate::cpu::{insert, server_cpu};
use crate::domain::{AccountEvent, text};
use crate::stores::{POSTGRES_SCHEMA, Store, postgres};

const USAGE: &str = "usage: cargo bench --bench storied -- growth MILLIONS [--long-lived] [--svg FILE]";

/// Number of parts of a fill.
const PARTS: usize = 30;
/// Number of concurrent appends.
const WRITERS: usize = 4;
/// Number of events of a transaction, each of another stream.
const BATCH: usize = 50;
/// Number of events of a short-lived stream.
const LIFE: u64 = 20;
/// Size of a payload in bytes.
const PAYLOAD: usize = 100;

/// The streams that events go to.
#[derive(Clone, Copy)]
struct Shape {
    /// Number of streams that events go to at a time.
    active: usize,
    /// Whether a stream ends after [`LIFE`] events.
    ends: bool,
}

/// A stream of one writer.
#[derive(Clone, Copy)]
struct Slot {
    id: i64,
    version: u64,
    end: u64,
}

/// One writer and its streams.
struct Writer {
    number: usize,
    slots: Vec<Slot>,
    next: usize,
    created: i64,
    /// Connection for plain inserts. It stays open, because the CPU time of ended processes is lost.
    connection: Option<PgConnection>,
}

impl Writer {
    fn new(number: usize, shape: Shape) -> Self {
        let mut writer = Self { number, slots: Vec::new(), next: 0, created: 0, connection: None };
        for slot in 0..shape.active / WRITERS {
            // The streams end one after the other, not all at once.
            let end = if shape.ends { slot as u64 % LIFE + 1 } else { u64::MAX };
            let id = writer.create();
            writer.slots.push(Slot { id, version: 0, end });
        }
        writer
    }

    fn create(&mut self) -> i64 {
        self.created += 1;
        self.created * WRITERS as i64 + self.number as i64
    }

    /// Returns the next streams, each with the version before its next event.
    fn batch(&mut self) -> Vec<(i64, u64)> {
        let mut batch = Vec::with_capacity(BATCH);
        for _ in 0..BATCH {
            let slot = self.slots[self.next];
            batch.push((slot.id, slot.version));
            let slot = match slot.version + 1 {
                version if version == slot.end => Slot { id: self.create(), version: 0, end: LIFE },
                version => Slot { version, ..slot },
            };
            self.slots[self.next] = slot;
            self.next = (self.next + 1) % self.slots.len();
        }
        batch
    }
}

/// What the events of one part cost.
#[derive(Clone, Copy)]
struct Cost {
    /// Events at the end of the part, in millions.
    millions: f64,
    per_second: f64,
    /// Bytes of WAL an event.
    wal: f64,
    /// Nanoseconds of the server an event.
    cpu: f64,
    /// Size of table and indexes in bytes, divided by all events.
    disk: f64,
}

/// Runs the command; `arguments` are those after its name.
pub async fn run(arguments: &[String]) {
    let (mut millions, mut svg) = (None, None);
    let mut shape = Shape { active: 2_000, ends: true };
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--long-lived" => shape = Shape { active: 100_000, ends: false },
            "--svg" => svg = arguments.next(),
            number => millions = number.parse::<f64>().ok().filter(|millions| *millions > 0.0),
        }
    }
    let Some(millions) = millions else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    let part = (millions * 1e6 / PARTS as f64) as usize;
    let part = part.next_multiple_of(WRITERS * BATCH);
    let ours = ours(part, shape).await;
    let raw = raw(part, shape).await;
    print!("{}", table(&ours, &raw));
    if let Some(file) = svg {
        std::fs::write(Path::new(file), plot(&ours, &raw)).unwrap();
    }
    crate::stores::clean().await;
}

async fn ours(part: usize, shape: Shape) -> Vec<Cost> {
    let store = Store::fresh(StoreKind::Postgres).await;
    let append = |store: Store, mut writer: Writer| {
        let event = AccountEvent::Entered { text: text(PAYLOAD) };
        async move {
            let codec = store.port().info().codec;
            for _ in 0..part / WRITERS / BATCH {
                let append = |(id, version): (i64, u64)| {
                    let new = NewEvent::encode(&event, codec, &Metadata::default()).unwrap();
                    let expected = ExpectedVersion::Exact(Version::new(version));
                    Append::one(StreamId::new("account", id).unwrap(), expected, vec![new])
                };
                for answer in store.port().append(writer.batch().into_iter().map(append).collect()).await {
                    answer.unwrap();
                }
            }
            writer
        }
    };
    fill(part, shape, POSTGRES_SCHEMA, move |writer| append(store.clone(), writer)).await
}

async fn raw(part: usize, shape: Shape) -> Vec<Cost> {
    let mut setup = postgres().await;
    let copy = format!(
        "DROP SCHEMA IF EXISTS raw_bench CASCADE; CREATE SCHEMA raw_bench;
         CREATE TABLE raw_bench.events (LIKE {POSTGRES_SCHEMA}.events INCLUDING ALL);
         ALTER TABLE raw_bench.events SET (autovacuum_vacuum_insert_scale_factor = 0.05);
         CREATE SEQUENCE raw_bench.positions;
         DROP SCHEMA {POSTGRES_SCHEMA} CASCADE"
    );
    setup.execute(AssertSqlSafe(copy)).await.unwrap();
    let write = |mut writer: Writer| {
        let event = AccountEvent::Entered { text: text(PAYLOAD) };
        async move {
            let mut connection = match writer.connection.take() {
                Some(connection) => connection,
                None => postgres().await,
            };
            for _ in 0..part / WRITERS / BATCH {
                let rows = writer.batch().into_iter().map(|(id, version)| (id, version as i64 + 1));
                insert(&mut connection, &event, rows).await;
            }
            writer.connection = Some(connection);
            writer
        }
    };
    let costs = fill(part, shape, "raw_bench", write).await;
    setup.execute("DROP SCHEMA raw_bench CASCADE").await.unwrap();
    costs
}

/// Writes all parts and measures each.
async fn fill<F>(part: usize, shape: Shape, schema: &str, write: impl Fn(Writer) -> F) -> Vec<Cost>
where
    F: Future<Output = Writer> + Send + 'static,
{
    let mut watch = postgres().await;
    let mut writers: Vec<Writer> = (0..WRITERS).map(|number| Writer::new(number, shape)).collect();
    let mut costs = Vec::new();
    for n in 1..=PARTS {
        let (wal, cpu, start) = (wal(&mut watch).await, server_cpu(&mut watch).await, Instant::now());
        let mut writing = JoinSet::new();
        writers.drain(..).for_each(|writer| _ = writing.spawn(write(writer)));
        writers = writing.join_all().await;
        let seconds = start.elapsed().as_secs_f64();
        let events = part as f64;
        let cost = Cost {
            millions: (n * part) as f64 / 1e6,
            per_second: events / seconds,
            wal: (self::wal(&mut watch).await - wal) / events,
            cpu: (server_cpu(&mut watch).await - cpu) / events,
            disk: disk(&mut watch, schema).await / (n * part) as f64,
        };
        eprintln!("{schema} {}", row(&cost));
        costs.push(cost);
    }
    costs
}

/// Returns the position in the WAL in bytes.
async fn wal(connection: &mut PgConnection) -> f64 {
    let bytes = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8";
    connection.fetch_one(bytes).await.unwrap().get(0)
}

/// Returns the size of the events in bytes, with their indexes.
async fn disk(connection: &mut PgConnection, schema: &str) -> f64 {
    let bytes = format!("SELECT pg_total_relation_size('{schema}.events')::float8");
    connection.fetch_one(AssertSqlSafe(bytes)).await.unwrap().get(0)
}

fn row(cost: &Cost) -> String {
    let Cost { millions, per_second, wal, cpu, disk } = cost;
    format!(
        "{millions:.2} million: {per_second:.0}/s, {wal:.0} B of WAL, {cpu:.0} ns of the server, {disk:.0} B on disk an event"
    )
}

/// Returns the parts as a table in Markdown, and the end beside the beginning.
fn table(ours: &[Cost], raw: &[Cost]) -> String {
    let mut text = String::from(
        "| million events | events/s | WAL an event | server CPU an event | on disk an event | INSERT: events/s | WAL | server CPU | on disk |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    let columns = |cost: &Cost| {
        format!(" {:.0} | {:.0} B | {:.0} ns | {:.0} B |", cost.per_second, cost.wal, cost.cpu, cost.disk)
    };
    for (index, (ours, raw)) in ours.iter().zip(raw).enumerate() {
        if index % 5 == 0 || index == PARTS - 1 {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "| {:.1} |{}{}", ours.millions, columns(ours), columns(raw));
        }
    }
    // Three parts at the beginning and at the end: single ones contain a checkpoint or none.
    let mean = |costs: &[Cost], of: fn(&Cost) -> f64| costs.iter().map(of).sum::<f64>() / costs.len() as f64;
    for (what, costs) in [("storied", ours), ("INSERT", raw)] {
        let [first, last] = [&costs[..3], &costs[PARTS - 3..]];
        let ratio = |of: fn(&Cost) -> f64| mean(last, of) / mean(first, of);
        let _ = writeln!(
            text,
            "\n{what}, the last tenth beside the first: rate {:.2}, WAL {:.2}, server CPU {:.2}",
            ratio(|cost| cost.per_second),
            ratio(|cost| cost.wal),
            ratio(|cost| cost.cpu)
        );
    }
    text
}

/// Draws rate and WAL of both sides.
fn plot(ours: &[Cost], raw: &[Cost]) -> String {
    const WIDTH: f64 = 640.0;
    const HEIGHT: f64 = 160.0;
    let end = ours.last().map_or(1.0, |cost| cost.millions);
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 720 440\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"720\" height=\"440\" fill=\"#ffffff\"/>\n",
    );
    let of = |panel: usize, cost: &Cost| if panel == 0 { cost.per_second } else { cost.wal };
    for (panel, title) in ["events a second", "bytes of WAL an event"].into_iter().enumerate() {
        let of = |cost: &Cost| of(panel, cost);
        let top = 30.0 + panel as f64 * (HEIGHT + 50.0);
        let most = ours.iter().chain(raw).map(of).fold(0.0, f64::max) * 1.1;
        let _ = writeln!(svg, "<text x=\"60\" y=\"{}\">{title}</text>", top - 8.0);
        for tenth in [0.0, 0.5, 1.0] {
            let (y, value) = (top + HEIGHT * (1.0 - tenth), most * tenth);
            let _ = writeln!(
                svg,
                "<path d=\"M60 {y} h{WIDTH}\" stroke=\"#d0d0d0\"/><text x=\"54\" y=\"{}\" text-anchor=\"end\">{value:.0}</text>",
                y + 4.0
            );
        }
        for (costs, colour, name, x) in
            [(raw, "#8a8a8a", "INSERT", 560.0), (ours, "#1f5fbf", "storied", 640.0)]
        {
            let points: Vec<String> = costs
                .iter()
                .map(|cost| {
                    format!(
                        "{:.1},{:.1}",
                        60.0 + WIDTH * cost.millions / end,
                        top + HEIGHT * (1.0 - of(cost) / most)
                    )
                })
                .collect();
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/><text x=\"{x}\" y=\"{}\" fill=\"{colour}\">{name}</text>",
                points.join(" "),
                top - 8.0
            );
        }
    }
    let _ = writeln!(
        svg,
        "<text x=\"60\" y=\"430\">0</text><text x=\"700\" y=\"430\" text-anchor=\"end\">{end:.0} million events</text>\n</svg>"
    );
    svg
}
