//! storied beside cqrs-es, disintegrate and evento, on the same PostgreSQL, in one run. See README.md.

mod common;
mod ours;
mod peer_cqrs_es;
mod peer_disintegrate;
mod peer_evento;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::json;

use common::{Answer, sql};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Workload {
    Commands,
    Hot,
    Catchup,
    Latency,
}

impl Workload {
    const ALL: [Workload; 4] = [Workload::Commands, Workload::Hot, Workload::Catchup, Workload::Latency];

    fn name(self) -> &'static str {
        match self {
            Workload::Commands => "commands",
            Workload::Hot => "hot",
            Workload::Catchup => "catchup",
            Workload::Latency => "latency",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }

    /// The peer, and its variant if it has several.
    fn sides(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Workload::Commands => &[("storied", ""), ("cqrs-es", ""), ("disintegrate", ""), ("evento", "")],
            Workload::Hot => &[
                ("storied", ""),
                ("cqrs-es", ""),
                ("cqrs-es", "snapshots"),
                ("disintegrate", ""),
                ("disintegrate", "snapshots"),
                ("evento", ""),
                ("evento", "snapshots"),
            ],
            Workload::Catchup => &[
                ("storied", ""),
                ("storied", "checkpoint"),
                ("cqrs-es", ""),
                ("disintegrate", ""),
                ("evento", "chunks of 5000"),
                ("evento", "chunks of 300"),
            ],
            // The queries of cqrs-es run within the command.
            Workload::Latency => {
                &[("storied", ""), ("disintegrate", ""), ("evento", "margin 20 ms"), ("evento", "margin 1 s")]
            }
        }
    }
}

/// How much is done in a run.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    commands: usize,
    hot: usize,
    catchup: usize,
    latency: usize,
}

struct Args {
    workloads: Vec<Workload>,
    runs: usize,
    percent: usize,
    json: Option<PathBuf>,
}

const USAGE: &str =
    "usage: storied-peers [commands|hot|catchup|latency]... [--runs N] [--percent OF_THE_SIZES] [--json FILE]
DATABASE_URL names a PostgreSQL server on which databases may be made";

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, workload, peer, variant, percent] = &arguments[..]
        && first == "one"
    {
        let workload = Workload::parse(workload).unwrap();
        let sizes = sizes(percent.parse().unwrap());
        // A task: the main thread is no worker, and waking it costs a system call.
        let (peer, variant) = (peer.clone(), variant.clone());
        let run = runtime.spawn(async move { one(workload, &peer, &variant, sizes).await });
        let answer = runtime.block_on(run).unwrap();
        println!("{}", serde_json::to_string(&answer).unwrap());
        // What a peer has left running ends here.
        std::process::exit(0);
    }
    let args = parse(arguments).unwrap_or_else(|message| {
        eprintln!("{message}");
        std::process::exit(2);
    });
    let url = match std::env::var("DATABASE_URL") {
        Ok(url) if !url.is_empty() => url,
        _ => {
            eprintln!("{USAGE}");
            std::process::exit(2);
        }
    };
    let mut answers: BTreeMap<(Workload, usize), Vec<Answer>> = BTreeMap::new();
    for workload in &args.workloads {
        for _ in 0..args.runs {
            for (place, (peer, variant)) in workload.sides().iter().enumerate() {
                let answer = runtime.block_on(measure(&url, *workload, peer, variant, args.percent));
                eprintln!("{} {peer} {variant}: {:.0}/s {}", workload.name(), answer.per_second, answer.note);
                answers.entry((*workload, place)).or_default().push(answer);
            }
        }
    }
    print!("{}", table(&answers));
    if let Some(file) = &args.json {
        let rows: Vec<_> =
            answers.iter().map(|((workload, place), runs)| row(*workload, *place, runs)).collect();
        let text = serde_json::to_string_pretty(&rows).unwrap();
        std::fs::write(file, text + "\n").unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
}

async fn one(workload: Workload, peer: &str, variant: &str, sizes: Sizes) -> Answer {
    let url = std::env::var("DATABASE_URL").unwrap();
    match peer {
        "storied" => ours::run(workload, variant, &url, sizes).await,
        "cqrs-es" => peer_cqrs_es::run(workload, variant, &url, sizes).await,
        "disintegrate" => peer_disintegrate::run(workload, variant, &url, sizes).await,
        "evento" => peer_evento::run(workload, variant, &url, sizes).await,
        other => panic!("there is no {other}"),
    }
}

/// In a process and a database of its own.
async fn measure(url: &str, workload: Workload, peer: &str, variant: &str, percent: usize) -> Answer {
    const DATABASE: &str = "storied_peers";
    let drop = format!("DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)");
    sql(url, &[&drop, &format!("CREATE DATABASE {DATABASE}"), "CHECKPOINT"]).await;
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["one", workload.name(), peer, variant, &percent.to_string()])
        .env("DATABASE_URL", in_database(url, DATABASE))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "{} of {peer} ended with {}", workload.name(), output.status);
    let answer = serde_json::from_slice(&output.stdout).unwrap();
    sql(url, &[&drop]).await;
    answer
}

/// The same server, another database.
fn in_database(url: &str, name: &str) -> String {
    let (address, parameters) = url.split_once('?').unwrap_or((url, ""));
    let server = match address.rsplit_once('/') {
        Some((server, _)) if !server.ends_with('/') => server,
        _ => address,
    };
    match parameters {
        "" => format!("{server}/{name}"),
        parameters => format!("{server}/{name}?{parameters}"),
    }
}

fn sizes(percent: usize) -> Sizes {
    let of = |size: usize| (size * percent / 100).max(1);
    Sizes { commands: of(10_000), hot: of(2_000), catchup: of(200_000), latency: of(1_000) }
}

fn parse(arguments: Vec<String>) -> Result<Args, String> {
    let mut args = Args { workloads: Vec::new(), runs: 3, percent: 100, json: None };
    let mut rest = arguments.into_iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{argument} needs a value\n{USAGE}"));
        match argument.as_str() {
            "--runs" => args.runs = number(&value()?)?,
            "--percent" => args.percent = number(&value()?)?,
            "--json" => args.json = Some(value()?.into()),
            name => {
                let workload = Workload::parse(name);
                args.workloads.push(workload.ok_or_else(|| format!("{name:?} is unknown\n{USAGE}"))?);
            }
        }
    }
    if args.workloads.is_empty() {
        args.workloads = Workload::ALL.to_vec();
    }
    Ok(args)
}

fn number(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{text:?} is no number above 0\n{USAGE}")),
    }
}

fn row(workload: Workload, place: usize, runs: &[Answer]) -> serde_json::Value {
    let (peer, variant) = workload.sides()[place];
    let rates: Vec<f64> = runs.iter().map(|run| run.per_second).collect();
    json!({
        "workload": workload.name(),
        "peer": peer,
        "variant": variant,
        "runs": runs.len(),
        "per_second": median(rates.clone()),
        "spread": [rates.iter().copied().fold(f64::INFINITY, f64::min), rates.iter().copied().fold(0.0, f64::max)],
        "p50_us": median(runs.iter().filter_map(|run| run.p50_us).collect()),
        "p99_us": median(runs.iter().filter_map(|run| run.p99_us).collect()),
        "notes": runs.iter().map(|run| run.note.as_str()).filter(|note| !note.is_empty()).collect::<Vec<_>>(),
    })
}

fn table(answers: &BTreeMap<(Workload, usize), Vec<Answer>>) -> String {
    let mut table = String::from(
        "| workload | side | per second [runs] | storied's is | p50 | p99 | |\n|---|---|---|---:|---:|---:|---|\n",
    );
    for ((workload, place), runs) in answers {
        let row = row(*workload, *place, runs);
        let ours = &row_of_ours(*workload, answers);
        let (peer, variant) = workload.sides()[*place];
        let number = |value: &serde_json::Value| value.as_f64().unwrap_or_default();
        let time = |value: &serde_json::Value| {
            value.as_f64().map(|us| format!("{:.2} ms", us / 1e3)).unwrap_or_default()
        };
        // Rates of latencies say nothing that the percentiles do not.
        let (rate, times) = match workload {
            Workload::Latency => (String::new(), number(&row["p50_us"]) / number(&ours["p50_us"])),
            _ => {
                let rate = number(&row["per_second"]);
                let spread = &row["spread"];
                let text = format!("{rate:.0} [{:.0}..{:.0}]", number(&spread[0]), number(&spread[1]));
                (text, number(&ours["per_second"]) / rate)
            }
        };
        let name = if variant.is_empty() { peer.to_owned() } else { format!("{peer}, {variant}") };
        let notes = row["notes"].as_array().and_then(|notes| notes.last()).and_then(|note| note.as_str());
        writeln!(
            table,
            "| {} | {name} | {rate} | × {times:.1} | {} | {} | {} |",
            workload.name(),
            time(&row["p50_us"]),
            time(&row["p99_us"]),
            notes.unwrap_or_default()
        )
        .unwrap();
    }
    table
}

/// The first of a workload's sides.
fn row_of_ours(workload: Workload, answers: &BTreeMap<(Workload, usize), Vec<Answer>>) -> serde_json::Value {
    answers.get(&(workload, 0)).map(|runs| row(workload, 0, runs)).unwrap_or_default()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
