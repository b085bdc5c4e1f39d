//! `storied process`.

use clap::ValueEnum;
use serde_json::{Value, json};
use storied::Position;
use storied::process::{
    InstanceState, InstanceStatus, OpenEffect, OpenTimer, ProcessOperator, ProcessRecord, ReadInstances,
};
use storied::store::StoredTimer;

use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::output::{Output, counted};
use crate::timer::due;

/// Maximum number of instances in a page of the library.
const PAGE: usize = 1_000;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Lists the instances of a process, or of all processes
    List(List),
    /// Shows an instance: its state, open effects, timers and held inputs
    Show(One),
    /// Requests a retry of a parked instance
    Retry(One),
    /// Requests the end of an instance, without compensation
    Cancel(One),
    /// Requests the compensation of an instance: it executes its undo commands
    Compensate(One),
}

#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Process [default: all]
    process: Option<String>,

    /// Only instances in this state
    #[arg(long)]
    state: Option<State>,

    /// First position in the log, to continue a list
    #[arg(long, value_name = "POSITION", requires = "process")]
    from: Option<u64>,

    /// Maximum number of instances of each process, 1 to 10000
    #[arg(long, default_value_t = 100, value_name = "INSTANCES", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    limit: u16,
}

#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// Process
    process: String,

    /// Id of the instance
    id: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum State {
    Running,
    Parked,
    Compensating,
    Completed,
    Compensated,
    Cancelled,
}

impl From<State> for InstanceState {
    fn from(state: State) -> Self {
        match state {
            State::Running => Self::Running,
            State::Parked => Self::Parked,
            State::Compensating => Self::Compensating,
            State::Completed => Self::Completed,
            State::Compensated => Self::Compensated,
            State::Cancelled => Self::Cancelled,
        }
    }
}

/// A request to an instance.
#[derive(Debug, Clone, Copy)]
enum Request {
    Retry,
    Cancel,
    Compensate,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let operator = ProcessOperator::new(from.store().await?);
    match command {
        Command::List(args) => list(&operator, args, out).await,
        Command::Show(one) => show(&operator, &one, out).await,
        Command::Retry(one) => request(&operator, &one, Request::Retry, out).await,
        Command::Cancel(one) => request(&operator, &one, Request::Cancel, out).await,
        Command::Compensate(one) => request(&operator, &one, Request::Compensate, out).await,
    }
}

/// The listed instances of a process, and the position at which the list continues.
struct Listed {
    process: ProcessRecord,
    instances: Vec<InstanceStatus>,
    next: Option<u64>,
}

async fn list(operator: &ProcessOperator, args: List, out: &mut Output) -> Result<(), Failure> {
    let processes = match &args.process {
        Some(name) => vec![operator.process(name).await?],
        None => operator.processes().await?,
    };
    let mut all = Vec::with_capacity(processes.len());
    for process in processes {
        all.push(instances(operator, process, &args).await?);
    }
    if out.json {
        let processes = all.iter().map(|Listed { process, next, .. }| {
            json!({ "name": process.name, "owner": process.owner, "paused": process.paused, "next": next })
        });
        let processes: Vec<_> = processes.collect();
        let instances: Vec<_> = all.iter().flat_map(|listed| &listed.instances).collect();
        return out.value(&json!({ "processes": processes, "instances": instances }));
    }
    print(&all, &args, out)
}

/// Reads the instances of a process, up to the limit.
async fn instances(
    operator: &ProcessOperator,
    process: ProcessRecord,
    args: &List,
) -> Result<Listed, Failure> {
    let limit = usize::from(args.limit);
    let mut read = ReadInstances::new().after(Position::new(args.from.unwrap_or_default().saturating_sub(1)));
    read.state = args.state.map(InstanceState::from);
    let mut instances = Vec::new();
    let mut next = Some(read.after);
    while let Some(after) = next.filter(|_| instances.len() < limit) {
        let page = read.after(after).limit(PAGE.min(limit - instances.len()));
        let page = operator.instances(&process.name, page).await?;
        instances.extend(page.instances);
        next = page.next;
    }
    Ok(Listed { process, instances, next: next.map(|after| after.get() + 1) })
}

fn print(all: &[Listed], args: &List, out: &mut Output) -> Result<(), Failure> {
    let rows: Vec<_> = all
        .iter()
        .flat_map(|listed| &listed.instances)
        .map(|instance| {
            [
                instance.process.clone(),
                instance.id.clone(),
                instance.state.to_string(),
                instance.version.to_string(),
                instance.effects.len().to_string(),
                instance.timers.len().to_string(),
                instance.held.to_string(),
                instance.parked.clone().unwrap_or_default(),
            ]
        })
        .collect();
    if all.is_empty() {
        return out.line("no node has run a process");
    }
    if rows.is_empty() {
        let state = args.state.map(|state| format!("{} ", InstanceState::from(state))).unwrap_or_default();
        let names: Vec<_> = all.iter().map(|listed| &*listed.process.name).collect();
        return out.line(format!("no {state}instances of {}", names.join(", ")));
    }
    out.table(["PROCESS", "ID", "STATE", "VERSION", "EFFECTS", "TIMERS", "HELD", "REASON"], &rows)?;
    for Listed { process, next, .. } in all {
        if let Some(next) = next {
            let (limit, name) = (args.limit, &process.name);
            let state = args.state.map(|state| format!(" --state {}", InstanceState::from(state)));
            let state = state.unwrap_or_default();
            out.line(format!(
                "… the limit of {limit} instances of {name}; the log continues: process list {name}{state} --from {next}"
            ))?;
        }
    }
    Ok(())
}

async fn show(operator: &ProcessOperator, one: &One, out: &mut Output) -> Result<(), Failure> {
    let process = operator.process(&one.process).await?;
    let status = operator.status(&one.process, &one.id).await?;
    let stored = operator.timers(&status).await?;
    let timers: Vec<_> = status
        .timers
        .iter()
        .map(|timer| (timer, stored.iter().find(|stored| stored.name == timer.name)))
        .collect();
    if out.json {
        let timers = timers.iter().map(|(timer, stored)| {
            json!({ "name": timer.name, "version": timer.version, "due_at": stored.map(|stored| stored.due_at) })
        });
        let timers: Vec<_> = timers.collect();
        return out.value(&json!({
            "process": status.process, "id": status.id, "state": status.state, "parked": status.parked,
            "version": status.version, "effects": status.effects, "timers": timers, "held": status.held,
            "owner": process.owner, "paused": process.paused,
        }));
    }
    out.line(format!("process   {}, {}", status.process, owner(&process)))?;
    out.line(format!("instance  {} v{}", status.id, status.version))?;
    out.line(format!("state     {}", status.state))?;
    if let Some(reason) = &status.parked {
        out.line(format!("reason    {reason}"))?;
    }
    out.line(format!("held      {} without a reaction", counted(status.held, "input")))?;
    if status.effects.is_empty() {
        out.line("effects   none without an answer")?;
    }
    if timers.is_empty() {
        out.line("timers    none")?;
    }
    effects(&status, out)?;
    if timers.is_empty() {
        return Ok(());
    }
    out.line("")?;
    let row = |(timer, stored): &(&OpenTimer, Option<&StoredTimer>)| {
        let due = stored.map_or("not stored".to_owned(), |stored| due(stored.due_at));
        [timer.name.clone(), format!("v{}", timer.version), due]
    };
    out.table(["TIMER", "VERSION", "DUE"], &timers.iter().map(row).collect::<Vec<_>>())
}

/// Prints the commands without an answer.
fn effects(status: &InstanceStatus, out: &mut Output) -> Result<(), Failure> {
    if status.effects.is_empty() {
        return Ok(());
    }
    let row = |effect: &OpenEffect| {
        let target = match &effect.target_id {
            Some(id) => format!("{}/{id}", effect.target),
            None => effect.target.clone(),
        };
        [effect.key.clone(), effect.command_id.to_string(), target]
    };
    let rows: Vec<_> = status.effects.iter().map(row).collect();
    out.line("")?;
    out.table(["EFFECT", "COMMAND", "TARGET"], &rows)
}

/// Describes the node that owns a process.
fn owner(process: &ProcessRecord) -> String {
    let owner = match process.owner {
        Some(node) => format!("owned by node {node}"),
        None => "no live node".to_owned(),
    };
    if process.paused { format!("paused, {owner}") } else { owner }
}

async fn request(
    operator: &ProcessOperator,
    one: &One,
    request: Request,
    out: &mut Output,
) -> Result<(), Failure> {
    let One { process, id } = one;
    let name = match request {
        Request::Retry => {
            operator.retry(process, id).await?;
            "retry"
        }
        Request::Cancel => {
            operator.cancel(process, id).await?;
            "cancel"
        }
        Request::Compensate => {
            operator.compensate(process, id).await?;
            "compensate"
        }
    };
    // The request is durable.
    let record = operator.process(process).await.ok();
    if out.json {
        let (owner, paused): (Value, Value) = match &record {
            Some(record) => (json!(record.owner), json!(record.paused)),
            None => (Value::Null, Value::Null),
        };
        return out.value(&json!({
            "process": process, "id": id, "request": name, "requested": true, "owner": owner, "paused": paused,
        }));
    }
    let acts = match record {
        Some(record) if record.paused => format!(
            "the process is paused, and acts on it after `storied projection resume \"{}\"`",
            record.projection()
        ),
        Some(ProcessRecord { owner: None, .. }) => {
            "no live node runs the process, and the next one that starts acts on it".to_owned()
        }
        Some(ProcessRecord { owner: Some(node), .. }) => {
            format!("node {node}, the owner of the process, acts on it")
        }
        None => "the owner of the process acts on it".to_owned(),
    };
    out.line(format!("requested to {name} instance {id} of {process}; {acts}"))
}
