//! examples/retail as a user runs it: a process on the real file.
//!
//! It is killed, repeated, and gets invalid input.

#[path = "../../examples/retail/domain.rs"]
#[allow(dead_code, reason = "only its events are read here")]
mod domain;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Dice, NatsOptions, NatsServer, example};
use domain::InvoiceEvent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rust_decimal::Decimal;
use serde::Deserialize;
use storied::{EventStore, Position, ReadLog, RecordedEvent, SqliteStore};
use tempfile::TempDir;

const CSV: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/retail/online-retail-10k.csv");

/// A directory with databases, and the output of its runs.
struct Shop {
    directory: TempDir,
    /// Options of the location of the log, if it is elsewhere.
    store: Vec<String>,
}

impl Shop {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), store: Vec::new() }
    }

    /// Keeps the log in its own database, on a PostgreSQL that all tests share.
    async fn on_postgres() -> Self {
        let url = crate::support::PostgresServer::shared().await.create_database().await;
        let store = ["--store", "postgres", "--database-url", &url].map(Into::into).into();
        Self { store, ..Self::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start(&self, args: &[&str]) -> Child {
        Command::new(example("retail"))
            .arg("--db")
            .arg(self.path("shop.db"))
            .args(&self.store)
            .args(args)
            .stdin(Stdio::null())
            .stdout(File::create(self.path("stdout")).unwrap())
            .stderr(File::create(self.path("stderr")).unwrap())
            .spawn()
            .unwrap()
    }

    fn run(&self, args: &[&str]) -> Said {
        let status = self.start(args).wait().unwrap();
        self.said(status)
    }

    fn said(&self, status: ExitStatus) -> Said {
        let read = |name| fs::read_to_string(self.path(name)).unwrap();
        Said { status, stdout: read("stdout"), stderr: read("stderr") }
    }

    fn report(&self, args: &[&str]) -> Report {
        self.run(&[&["--json"], args].concat()).report()
    }

    /// Reads the log from a copy, so that the next run finds the files of the last one unchanged.
    async fn log(&self) -> Vec<RecordedEvent> {
        let copy = Shop::new();
        for file in ["shop.db", "shop.db-wal"] {
            let _ = fs::copy(self.path(file), copy.path(file)); // may not be there yet
        }
        let store = SqliteStore::open(copy.path("shop.db")).await.unwrap();
        let read = ReadLog { limit: usize::MAX, ..ReadLog::after(Position::START) };
        store.read_log(read).await.unwrap().events
    }
}

struct Said {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Said {
    fn report(self) -> Report {
        assert!(self.status.success(), "{}: {}", self.status, self.stderr);
        assert_eq!(self.stdout.trim_end().lines().count(), 1, "one JSON object, and nothing else");
        serde_json::from_str(&self.stdout).unwrap()
    }
}

#[derive(Debug, Deserialize)]
struct Report {
    lines: u64,
    commands: u64,
    rejected: u64,
    duplicates: u64,
    new_events: u64,
    events: u64,
    #[serde(flatten)]
    totals: Totals,
    seconds: f64,
    commands_per_second: f64,
}

/// The totals of a file. Money is compared as text, to the penny.
#[derive(Debug, PartialEq, Deserialize)]
struct Totals {
    invoices: usize,
    cancellations: usize,
    total: String,
    revenue_by_country: BTreeMap<String, String>,
    units_by_stock_code: BTreeMap<String, i64>,
}

/// Computes the totals from the file, without code of storied or of the example.
fn totals_of(file: impl AsRef<Path>) -> Totals {
    let (mut numbers, mut revenue, mut units) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
    for row in csv::Reader::from_path(file).unwrap().deserialize() {
        let row: BTreeMap<String, String> = row.unwrap();
        let quantity: i64 = row["Quantity"].parse().unwrap();
        let price: Decimal = row["UnitPrice"].parse().unwrap();
        *revenue.entry(row["Country"].clone()).or_default() += Decimal::from(quantity) * price;
        *units.entry(row["StockCode"].clone()).or_default() += quantity;
        numbers.insert(row["InvoiceNo"].clone());
    }
    let cancellations = numbers.iter().filter(|number| number.starts_with('C')).count();
    Totals {
        invoices: numbers.len() - cancellations,
        cancellations,
        total: format!("{:.2}", revenue.values().sum::<Decimal>()),
        revenue_by_country: revenue
            .into_iter()
            .map(|(country, sum)| (country, format!("{sum:.2}")))
            .collect(),
        units_by_stock_code: units,
    }
}

#[test]
fn the_file_has_its_known_totals() {
    let totals = totals_of(CSV);
    assert_eq!((totals.invoices, totals.cancellations, &*totals.total), (469, 43, "180667.75"));
    assert_eq!((totals.revenue_by_country.len(), totals.units_by_stock_code.len()), (15, 2015));
    for (country, revenue) in [("United Kingdom", "164937.22"), ("EIRE", "3147.23"), ("Portugal", "131.80")] {
        assert_eq!(totals.revenue_by_country[country], revenue);
    }
    for (code, units) in [("84077", 3409), ("84950", 1842), ("21915", 1660), ("17084R", 1440), ("21212", 975)]
    {
        assert_eq!(totals.units_by_stock_code[code], units);
    }
}

#[tokio::test]
async fn totals_are_exact_and_a_second_run_changes_nothing() {
    let shop = Shop::new();
    let first = shop.report(&[]);
    assert_eq!((first.lines, first.commands, first.rejected, first.duplicates), (10_000, 10_512, 0, 0));
    assert_eq!((first.new_events, first.events), (10_512, 10_512));
    assert_eq!(first.totals, totals_of(CSV));
    assert!(first.seconds > 0.0 && first.commands_per_second > 0.0);
    let mut lines: BTreeMap<String, u32> = BTreeMap::new();
    for event in shop.log().await {
        let line = event.decode::<InvoiceEvent>().unwrap().line().map_or(0, |line| line.number);
        let next = lines.entry(event.stream.id().to_owned()).or_default();
        assert_eq!(line, *next, "{} was written in the order of the file", event.stream);
        *next += 1;
    }
    assert_eq!(lines.len(), 512);

    let second = shop.report(&["--input", CSV]);
    assert_eq!(
        (second.lines, second.commands, second.rejected, second.duplicates),
        (10_000, 10_512, 0, 10_512)
    );
    assert_eq!((second.new_events, second.events), (0, 10_512));
    assert_eq!(second.totals, first.totals);

    let third = shop.run(&[]);
    assert!(third.status.success(), "{}", third.stderr);
    for part in [
        "Nothing changed",
        "10512 events",
        "469 invoices",
        "43 cancellations",
        "180667.75",
        "commands a second",
    ] {
        assert!(third.stdout.contains(part), "{part} is missing:\n{}", third.stdout);
    }
    let again = shop.report(&["--reset"]);
    assert_eq!((again.duplicates, again.new_events, again.totals), (0, 10_512, first.totals));
}

/// Runs over NATS: the log stream has the whole log, also after a reset and a second run.
#[tokio::test]
async fn totals_are_exact_over_nats() {
    let server = NatsServer::start(NatsOptions::jetstream()).await;
    for bus in ["core", "jetstream"] {
        let shop = Shop::new();
        for reset in [&["--bus"][..], &["--reset", "--bus"], &["--bus"]] {
            let report = shop.report(&[reset, &[bus, "--nats-url", &server.url()]].concat());
            assert_eq!((report.events, report.totals), (10_512, totals_of(CSV)), "{bus}");
        }
    }
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let stream = context.get_stream("RETAIL_EVENTS").await.unwrap();
    assert_eq!(stream.cached_info().state.messages, 10_512);
}

#[tokio::test]
async fn totals_are_exact_on_postgres() {
    let shop = Shop::on_postgres().await;
    let first = shop.report(&[]);
    assert_eq!((first.commands, first.rejected, first.new_events), (10_512, 0, 10_512));
    assert_eq!(first.totals, totals_of(CSV));
    let second = shop.report(&[]);
    assert_eq!((second.duplicates, second.new_events, second.events), (10_512, 0, 10_512));
    assert_eq!(second.totals, first.totals);
    let again = shop.report(&["--reset"]);
    assert_eq!((again.duplicates, again.new_events, again.totals), (0, 10_512, first.totals));

    let nowhere = Shop { store: vec!["--store".into(), "postgres".into()], ..Shop::new() };
    let said = nowhere.run(&["--database-url", "postgres://nobody:secret@127.0.0.1:1/none"]);
    assert_eq!(said.status.code(), Some(1));
    assert!(said.stderr.contains("unavailable") && !said.stderr.contains("secret"), "{}", said.stderr);
}

#[tokio::test]
async fn totals_are_exact_after_kills() {
    killed(12, async || Shop::new()).await;
}

#[tokio::test]
async fn totals_are_exact_after_kills_on_postgres() {
    killed(6, Shop::on_postgres).await;
}

/// Three processes share the read models.
///
/// The test kills the others while the first works, and then the first.
#[tokio::test]
async fn any_node_may_be_killed() {
    let shop = Shop::on_postgres().await;
    let expected = totals_of(CSV);
    let nodes = ["--json", "--nodes", "3"];
    let mut killed = 0;
    for round in 0..2 {
        let mut run = shop.start(&[&nodes[..], &["--reset"]].concat());
        let mut others = children(run.id());
        while others.len() < 2 && run.try_wait().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
            others = children(run.id());
        }
        for other in others {
            tokio::time::sleep(Duration::from_millis(300 * round)).await;
            killed += usize::from(kill(other, Signal::SIGKILL).is_ok());
        }
        let status = run.wait().unwrap();
        let report = shop.said(status).report();
        assert_eq!((report.totals, report.events), (totals_of(CSV), 10_512));
    }
    assert!(killed >= 2, "the runs ended before the kills");

    let mut run = shop.start(&[&nodes[..], &["--reset"]].concat());
    let mut others = children(run.id());
    while others.len() < 2 {
        assert!(run.try_wait().unwrap().is_none());
        tokio::time::sleep(Duration::from_millis(1)).await;
        others = children(run.id());
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    run.kill().unwrap();
    run.wait().unwrap();
    // The remaining process completes the work and ends.
    let ended = Instant::now();
    while others.iter().any(|other| is_running(*other)) {
        assert!(ended.elapsed() < Duration::from_secs(30), "{others:?} are still there");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let report = shop.report(&nodes);
    assert_eq!((report.totals, report.events), (expected, 10_512));
}

fn children(of: u32) -> Vec<Pid> {
    let children = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    children.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap())).collect()
}

/// Returns whether a process runs; a zombie does not.
fn is_running(process: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    status.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

/// Kills runs at random moments, on databases that grow from run to run.
async fn killed(times: u32, open: impl AsyncFn() -> Shop) {
    let seed = match std::env::var("RETAIL_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => uuid::Uuid::new_v4().as_u64_pair().0,
    };
    println!("RETAIL_SEED={seed}");
    let dice = Dice::new(seed);
    let expected = totals_of(CSV);
    let shop = open().await;
    let started = Instant::now();
    assert_eq!(shop.report(&[]).totals, expected);
    let a_run = started.elapsed();
    let mut kills = 0;
    while kills < times {
        let shop = open().await;
        // Few kills on each database, so that many find one that still grows.
        for round in 0..3 {
            // After a kill, a run first waits for the read models.
            let span = if round == 0 { a_run.mul_f64(0.8) } else { a_run + Duration::from_secs(1) };
            let delay = Duration::from_micros(dice.roll(span.as_micros() as u64));
            let mut run = shop.start(&["--json"]);
            let until = Instant::now() + delay;
            while Instant::now() < until && run.try_wait().unwrap().is_none() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            run.kill().unwrap(); // SIGKILL
            let status = run.wait().unwrap();
            if status.code().is_some() {
                assert_eq!(shop.said(status).report().totals, expected, "the run ended before the kill");
                break;
            }
            kills += 1;
            println!("kill {kills} after {delay:?}");
        }
        let last = shop.report(&[]);
        println!("then {} commands had been done before", last.duplicates);
        assert_eq!(last.totals, expected);
        assert_eq!((last.events, last.rejected, last.commands), (10_512, 0, 10_512));
        assert_eq!(last.duplicates + last.new_events, 10_512);
    }
}

#[test]
fn a_malformed_row_is_reported_and_earlier_rows_are_kept() {
    let content = fs::read_to_string(CSV).unwrap();
    let lines: Vec<_> = content.lines().collect();
    // Row 2000 of the file is on its line 2001.
    let good = lines[2000];
    let mut fields: Vec<_> = good.split(',').collect();
    assert_eq!(fields.len(), 8, "no commas within: {good}");
    let column = |field: usize| fields[..field].iter().map(|text| text.len() + 1).sum::<usize>() + 1;
    let (quantity, date) = (column(3), column(4));
    let missing = good.len() - fields[7].len();
    let mut malformed = |field: usize, text| {
        let before = std::mem::replace(&mut fields[field], text);
        let row = fields.join(",");
        fields[field] = before;
        row
    };
    let cases = [
        (malformed(3, "six"), quantity, "Quantity \"six\" is not a whole number"),
        (malformed(4, "1/12/2010 8:26"), date, "InvoiceDate \"1/12/2010 8:26\" is not a date"),
        (good[..missing - 1].to_owned(), missing, "the row has 7 columns instead of 8"),
    ];
    for (row, column, problem) in cases {
        let shop = Shop::new();
        let input = shop.path("input.csv");
        let input_arg = input.to_str().unwrap();
        let with = |row| {
            let mut lines = lines.clone();
            lines[2000] = row;
            fs::write(&input, lines.join("\n")).unwrap();
        };
        with(&row);
        let said = shop.run(&["--json", "--input", input_arg]);
        assert_eq!(said.status.code(), Some(1), "{}", said.stderr);
        assert_eq!(said.stdout, "");
        let place = format!("{input_arg}:2001:{column}: {problem}");
        assert!(said.stderr.contains(&place), "{place:?} is not in {:?}", said.stderr);

        with(good);
        let report = shop.report(&["--input", input_arg]);
        assert_eq!(report.totals, totals_of(CSV));
        let invoices: BTreeSet<_> = lines[1..2000].iter().map(|line| line.split(',').next()).collect();
        assert_eq!(report.duplicates, 1_999 + invoices.len() as u64, "all rows before were done");
    }
}

/// Imports the file again with one changed row: the invoice refuses that row, and stays unchanged.
#[test]
fn a_changed_row_is_rejected() {
    let shop = Shop::new();
    let content = fs::read_to_string(CSV).unwrap();
    let head: Vec<_> = content.lines().take(1_001).collect();
    let input = shop.path("input.csv");
    let input_arg = input.to_str().unwrap();
    fs::write(&input, head.join("\n")).unwrap();
    let first = shop.report(&["--input", input_arg]);
    assert_eq!(first.totals, totals_of(&input));
    fs::write(
        &input,
        head.join("\n").replacen(",6,2010-12-01 08:26:00,2.55,", ",600,2010-12-01 08:26:00,2.55,", 1),
    )
    .unwrap();
    let said = shop.run(&["--json", "--input", input_arg]);
    assert!(said.stderr.contains("is on the invoice already"), "{}", said.stderr);
    let second = said.report();
    assert_eq!((second.rejected, second.new_events), (1, 0));
    assert_eq!(second.totals, first.totals);
}

/// Checks that separated rows of one invoice belong to one invoice.
#[test]
fn rows_of_an_invoice_may_be_apart() {
    let shop = Shop::new();
    let content = fs::read_to_string(CSV).unwrap();
    let mut lines: Vec<_> = content.lines().take(1_001).collect();
    for line in [2, 4, 5, 9] {
        lines[line..].rotate_left(1);
    }
    let input = shop.path("input.csv");
    let input_arg = input.to_str().unwrap();
    fs::write(&input, lines.join("\n")).unwrap();
    let first = shop.report(&["--input", input_arg]);
    assert_eq!((first.totals, first.rejected, first.duplicates), (totals_of(&input), 0, 0));
    assert_eq!(shop.report(&["--input", input_arg]).new_events, 0);
}

#[test]
fn the_command_line_is_checked() {
    let shop = Shop::new();
    for (args, what) in [
        (&["--speed", "fast"][..], "unknown option --speed"),
        (&["retail.csv"], "unknown option retail.csv"),
        (&["--input"], "--input needs a value"),
        (&["--store", "mysql"], "--store cannot be mysql"),
        (&["--bus", "omnibus"], "--bus cannot be omnibus"),
        (&["--store", "postgres", "--nodes", "0"], "--nodes cannot be 0"),
        (&["--nodes", "2"], "--nodes needs --store postgres"),
    ] {
        let said = shop.run(args);
        assert_eq!((said.status.code(), &*said.stdout), (Some(2), ""));
        assert!(said.stderr.contains(what) && said.stderr.contains("--help"), "{}", said.stderr);
    }
    let help = shop.run(&["--help"]);
    assert!(help.status.success() && help.stdout.contains("--reset"), "{}", help.stdout);
    let said = shop.run(&["--input", "nowhere.csv"]);
    assert_eq!(said.status.code(), Some(1));
    assert!(said.stderr.contains("nowhere.csv"), "{}", said.stderr);
    assert!(!shop.path("shop.db").exists(), "nothing was begun");

    fs::write(shop.path("shop.db"), "a letter to a friend").unwrap();
    let said = shop.run(&["--reset"]);
    assert_eq!(said.status.code(), Some(1));
    assert!(said.stderr.contains("no SQLite database"), "{}", said.stderr);
    assert_eq!(fs::read_to_string(shop.path("shop.db")).unwrap(), "a letter to a friend");

    fs::remove_file(shop.path("shop.db")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(shop.path("shop.db")).status().unwrap().success());
    let said = shop.run(&["--reset"]);
    assert_eq!(said.status.code(), Some(1));
    assert!(said.stderr.contains("no SQLite database"), "{}", said.stderr);
}
