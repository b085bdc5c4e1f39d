//! `storied projection`.

mod progress_bar;

use std::time::Duration;

use serde_json::{Value, json};
use storied::Position;
use storied::projection::{Answer, Operator, ProjectionRecord, Request, RequestTicket};
use tokio::time::{Instant, sleep};

use self::progress_bar::Bar;
use crate::database::{DatabaseArgs, Models, ReadModelArgs};
use crate::failure::Failure;
use crate::output::Output;

/// Poll interval of a request.
const POLL: Duration = Duration::from_millis(100);

/// Maximum time without progress of a request.
const STILL: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Lists the projections with checkpoints in the read model's database, and the paused ones
    List {
        #[command(flatten)]
        read_model: ReadModelArgs,
    },
    /// Pauses a projection on all nodes until it is resumed
    Pause(Named),
    /// Resumes a projection; a failed one retries
    Resume(Named),
    /// Requests that a node empties the read model and applies the log from its start
    Reset(RequestArgs),
    /// Requests that the nodes rebuild the read model beside the live version, and cut over
    Rebuild(RequestArgs),
    /// Requests that a node cancels a rebuild; the live version stays live
    CancelRebuild(RequestArgs),
    /// Withdraws a reset, rebuild or cancel-rebuild that no node has taken, or deletes its refusal
    Withdraw {
        #[command(flatten)]
        read_model: ReadModelArgs,
        /// Projection
        name: String,
    },
}

impl Command {
    pub(crate) fn read_model(&self) -> &ReadModelArgs {
        match self {
            Self::List { read_model } | Self::Withdraw { read_model, .. } => read_model,
            Self::Pause(args) | Self::Resume(args) => &args.read_model,
            Self::Reset(args) | Self::Rebuild(args) | Self::CancelRebuild(args) => &args.read_model,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Named {
    #[command(flatten)]
    read_model: ReadModelArgs,

    /// Projection
    name: String,

    /// Also if the projection has no records here, as an in-memory one
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RequestArgs {
    #[command(flatten)]
    read_model: ReadModelArgs,

    /// Projection
    name: String,

    #[command(flatten)]
    wait: WaitArgs,

    /// Returns as soon as a node has taken the request, before it is done
    #[arg(long)]
    detach: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct WaitArgs {
    /// Time limit for a node to take the request, 0 to 86400; the request stands after that
    #[arg(long, default_value_t = 15, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    take_within: u64,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    match command {
        Command::List { read_model } => list(&read_model.open(from).await?, out).await,
        Command::Pause(args) => pause(&args, from, out, true).await,
        Command::Resume(args) => pause(&args, from, out, false).await,
        Command::Reset(args) => report(&args, Request::Reset, from, out).await,
        Command::Rebuild(args) => report(&args, Request::Rebuild, from, out).await,
        Command::CancelRebuild(args) => report(&args, Request::CancelRebuild, from, out).await,
        Command::Withdraw { read_model, name } => withdraw(&read_model.open(from).await?, &name, out).await,
    }
}

/// Returns the status of a projection as JSON.
pub(crate) fn value(record: &ProjectionRecord, head: Position) -> Value {
    let parts: Vec<_> = record
        .parts
        .iter()
        .map(|part| {
            json!({ "partition": part.partition.map(|partition| partition.index()), "position": part.position.get(),
                "updated_at": part.updated_at, "owner": part.owner })
        })
        .collect();
    let requests: Vec<_> = record
        .requests
        .iter()
        .map(|(request, answer)| {
            let refused = match answer {
                Answer::Refused(reason) => Some(reason),
                _ => None,
            };
            json!({ "request": request.to_string(), "refused": refused })
        })
        .collect();
    let rebuild = record.rebuild.as_ref().map(|rebuild| {
        let positions: Vec<_> = rebuild.positions.iter().map(|position| position.get()).collect();
        json!({ "version": rebuild.version, "positions": positions })
    });
    json!({
        "name": record.name, "state": state(record), "position": record.position.get(), "head": head.get(),
        "lag": lag(record, head), "version": record.version, "parked": record.parked, "paused": record.paused,
        "foreign": record.foreign, "parts": parts, "rebuild": rebuild, "requests": requests,
    })
}

/// Returns the visible state; only its node knows whether a projection has failed.
fn state(record: &ProjectionRecord) -> &'static str {
    let owned = record.parts.iter().filter(|part| part.owner.is_some()).count();
    match (record.paused, owned) {
        (true, _) => "paused",
        (false, 0) => "no node",
        (false, owned) if owned < record.parts.len() => "partly owned",
        (false, _) => "owned",
    }
}

fn lag(record: &ProjectionRecord, head: Position) -> Option<u64> {
    (!record.foreign && !record.parts.is_empty()).then(|| head.get().saturating_sub(record.position.get()))
}

/// Prints the projections in columns, and further facts below.
pub(crate) fn print(records: &[ProjectionRecord], head: Position, out: &mut Output) -> Result<(), Failure> {
    let rows: Vec<_> = records
        .iter()
        .map(|record| {
            [
                record.name.clone(),
                state(record).to_owned(),
                record.position.to_string(),
                lag(record, head).map_or("?".to_owned(), |lag| lag.to_string()),
                record.version.to_string(),
                record.parts.len().to_string(),
                record.parked.to_string(),
            ]
        })
        .collect();
    out.table(["PROJECTION", "STATE", "POSITION", "LAG", "VERSION", "PARTS", "PARKED"], &rows)?;
    for record in records {
        let name = &record.name;
        if record.foreign {
            out.line(format!(
                "{name}: the read model belongs to another event store; reset the projection, or use that store"
            ))?;
        }
        if let Some(rebuild) = &record.rebuild {
            let (done, of) = progress(&rebuild.positions, head);
            out.line(format!("{name}: version {} is being built, {done} of {of}", rebuild.version))?;
        }
        for (request, answer) in &record.requests {
            match answer {
                Answer::Refused(reason) => out.line(format!("{name}: {request} was refused: {reason}"))?,
                _ => out.line(format!("{name}: {request} is requested; no node has taken it yet"))?,
            }
        }
    }
    Ok(())
}

async fn list(models: &Models, out: &mut Output) -> Result<(), Failure> {
    let head = models.store.high_water_mark().await?;
    let records = models.operator.projections().await?;
    if out.json {
        let records: Vec<_> = records.iter().map(|record| value(record, head)).collect();
        return out.value(&json!({ "head": head.get(), "projections": records }));
    }
    if records.is_empty() {
        return out.line("no projection has a checkpoint here");
    }
    print(&records, head, out)
}

/// Returns the record of a projection.
pub(crate) async fn known(operator: &Operator, name: &str) -> Result<ProjectionRecord, Failure> {
    let found = operator.projection(name).await?.filter(|record| !record.parts.is_empty());
    found.ok_or_else(|| {
        Failure::Refused(format!(
            "no projection {name} in this database; see `storied projection list`, or pass --read-model-url"
        ))
    })
}

async fn pause(args: &Named, from: &DatabaseArgs, out: &mut Output, pause: bool) -> Result<(), Failure> {
    let Models { operator, .. } = args.read_model.open(from).await?;
    let name = &args.name;
    let record = operator.projection(name).await?;
    if record.is_none() && !args.force {
        return Err(Failure::Refused(format!(
            "no projection {name} in this database; if its read model is in memory or elsewhere, pass --force"
        )));
    }
    if pause {
        operator.pause(name).await?
    } else {
        operator.resume(name).await?
    }
    let owners = record.map_or(0, |record| record.parts.iter().filter(|part| part.owner.is_some()).count());
    if out.json {
        return out.value(&json!({ "projection": name, "paused": pause, "owned_parts": owners }));
    }
    let word = if pause { "paused" } else { "resumed" };
    match owners {
        0 => out.line(format!("{name} is {word}; no live node owns it, nodes follow when they start")),
        _ => out.line(format!("{name} is {word}; its nodes follow within 1 s")),
    }
}

async fn withdraw(models: &Models, name: &str, out: &mut Output) -> Result<(), Failure> {
    let mut withdrawn = Vec::new();
    for request in [Request::Reset, Request::Rebuild, Request::CancelRebuild] {
        if models.operator.withdraw(name, request).await? {
            withdrawn.push(request.to_string());
        }
    }
    if withdrawn.is_empty() {
        return Err(Failure::Refused(format!(
            "no pending request of {name}: none was made, or a node has taken it"
        )));
    }
    if out.json {
        return out.value(&json!({ "projection": name, "withdrawn": withdrawn }));
    }
    out.line(format!("withdrew the {} of {name}", withdrawn.join(" and the ")))
}

async fn report(
    args: &RequestArgs,
    request: Request,
    from: &DatabaseArgs,
    out: &mut Output,
) -> Result<(), Failure> {
    let models = args.read_model.open(from).await?;
    let (operator, name) = (&models.operator, &args.name);
    let before = known(operator, name).await?;
    let asked = ask(operator, name, request).await?;
    take(operator, &asked, request, name, &args.wait).await?;
    let at_once = request == Request::CancelRebuild;
    let done = if args.detach || at_once || (before.paused && request == Request::Reset) {
        None
    } else {
        Some(follow(&models, request, before.version, name).await?)
    };
    if out.json {
        let (seconds, version) = done.unzip();
        return out.value(&json!({
            "projection": name, "request": request.to_string(), "taken": true, "done": at_once || seconds.is_some(),
            "seconds": seconds, "version": version,
        }));
    }
    match (request, done) {
        (Request::Reset, Some((seconds, _))) => {
            out.line(format!("{name} was reset, and has caught up in {seconds:.1} s"))
        }
        (Request::Reset, None) if before.paused => {
            out.line(format!("{name} was reset; it is paused, and starts when it is resumed"))
        }
        (Request::CancelRebuild, _) => out.line(format!("the rebuild of {name} is cancelled")),
        (_, Some((seconds, version))) => {
            out.line(format!("{name} was rebuilt in {seconds:.1} s, and version {version} is live"))
        }
        (_, None) => out.line(format!("a node has taken the {request} of {name}")),
    }
}

/// Sends a request to the nodes. If that fails, the error states whether the request stands.
pub(crate) async fn ask(operator: &Operator, name: &str, request: Request) -> Result<RequestTicket, Failure> {
    let error = match operator.ask(name, request).await {
        Ok(asked) => return Ok(asked),
        Err(error) => error,
    };
    // The request is stored before the nodes are notified. If this read fails too, the first error
    // has the cause.
    let record = operator.projection(name).await.unwrap_or_default();
    let stands = record.is_some_and(|record| record.requests.contains(&(request, Answer::Waiting)));
    if !stands {
        return Err(match Failure::from(error) {
            Failure::Unavailable(text) => Failure::Unavailable(format!(
                "{text}; check `storied projection list` before a new request: the {request} of {name} may stand or be taken"
            )),
            other => other,
        });
    }
    let back = take_back(name, request);
    Err(Failure::Pending(format!(
        "notifying the nodes of the {request} of {name} failed: {error}; the request stands and the next node executes it; \
         withdraw it with `{back}`"
    )))
}

fn take_back(name: &str, request: Request) -> String {
    match request {
        Request::Retry(position) => format!("storied parked withdraw {name} {position}"),
        _ => format!("storied projection withdraw {name}"),
    }
}

/// Waits until a node has taken a request.
pub(crate) async fn take(
    operator: &Operator,
    asked: &RequestTicket,
    request: Request,
    name: &str,
    wait: &WaitArgs,
) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(wait.take_within);
    loop {
        match operator.answer(asked).await? {
            Answer::Taken => return Ok(()),
            Answer::Refused(reason) => {
                operator.withdraw(name, request).await?;
                return Err(Failure::Problem(format!("a node refused the {request} of {name}: {reason}")));
            }
            _ if Instant::now() >= deadline => {
                let owned = operator.projection(name).await?;
                let owned = owned.is_some_and(|record| record.parts.iter().any(|part| part.owner.is_some()));
                let why = if owned {
                    "the node that owns the projection has not reached it"
                } else {
                    "no live node runs the projection"
                };
                let back = take_back(name, request);
                return Err(Failure::Pending(format!(
                    "no node has taken the {request} of {name} within {} s: {why}; the request stands and the next node executes it; \
                     withdraw it with `{back}`",
                    wait.take_within
                )));
            }
            _ => sleep(POLL).await,
        }
    }
}

/// Returns the applied positions of all parts together, and their goal.
fn progress(positions: &[Position], head: Position) -> (u64, u64) {
    let done = positions.iter().map(|position| position.get().min(head.get())).sum();
    (done, head.get().saturating_mul(u64::try_from(positions.len()).unwrap_or(u64::MAX)))
}

/// Shows the progress until the request is done; returns its duration and the version.
///
/// A reset is done when the events of the log at its start are applied, a rebuild when its version
/// is live.
async fn follow(models: &Models, request: Request, version: u64, name: &str) -> Result<(f64, u64), Failure> {
    let head = models.store.high_water_mark().await?;
    let mut bar = Bar::new();
    // A reset starts again from the beginning, unless it has progressed already; a rebuild may be
    // running.
    let mut start = None;
    let mut moved = (0, Instant::now());
    loop {
        let record = known(&models.operator, name).await?;
        let positions = match (&record.rebuild, request) {
            (Some(rebuild), Request::Rebuild) => rebuild.positions.clone(),
            (None, Request::Rebuild) if record.version > version => {
                bar.end();
                return Ok((bar.seconds(), record.version));
            }
            // A node begins and cancels a rebuild in one transaction with the request.
            (None, Request::Rebuild) => {
                bar.end();
                return Err(Failure::Problem(format!(
                    "the rebuild of {name} was cancelled; version {} stays live",
                    record.version
                )));
            }
            _ => record.parts.iter().map(|part| part.position).collect(),
        };
        let (done, of) = progress(&positions, head);
        if request == Request::Reset && done >= of {
            bar.end();
            return Ok((bar.seconds(), record.version));
        }
        bar.show(name, done, of, *start.get_or_insert(done));
        if done != moved.0 {
            moved = (done, Instant::now());
        }
        if moved.1.elapsed() > STILL {
            bar.end();
            return Err(Failure::Pending(format!(
                "the {request} of {name} makes no progress: {done} of {of} positions for {} s; see the log and the status of the node \
                 that owns the projection; it continues by itself",
                STILL.as_secs()
            )));
        }
        sleep(POLL).await;
    }
}
