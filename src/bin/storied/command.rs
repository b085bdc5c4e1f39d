//! `storied command`.

use std::sync::Arc;

use chrono::Utc;
use clap::ValueEnum;
use serde_json::json;
use storied::EventStore;
use storied::schedule::{Cancellation, ScheduledCommandHandle, ScheduledCommandStatus};
use storied::store::{ScheduledQuery, ScheduledState};
use uuid::Uuid;

use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::output::Output;
use crate::timer::{due, left};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Lists the scheduled commands, by due time
    List(List),
    /// Cancels a command that has not started
    Cancel(One),
    /// Executes a parked command again, now
    Retry(One),
}

#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Only commands in this state
    #[arg(long)]
    state: Option<State>,

    /// Only commands of this recurring schedule
    #[arg(long, value_name = "SCHEDULE")]
    schedule: Option<String>,

    /// Maximum number of commands, 1 to 10000
    #[arg(long, default_value_t = 100, value_name = "COMMANDS", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    limit: u16,
}

#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// Id of the command
    id: Uuid,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum State {
    Waiting,
    Started,
    Parked,
}

impl From<State> for ScheduledState {
    fn from(state: State) -> Self {
        match state {
            State::Waiting => Self::Waiting,
            State::Started => Self::Started,
            State::Parked => Self::Parked,
        }
    }
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let store = from.store().await?;
    match command {
        Command::List(args) => list(&store, args, out).await,
        Command::Cancel(One { id }) => match ScheduledCommandHandle::new(store, id).cancel().await? {
            Cancellation::Cancelled if out.json => out.value(&json!({ "command": id, "cancelled": true })),
            Cancellation::Cancelled => out.line(format!("cancelled command {id}")),
            Cancellation::Started => Err(Failure::Problem(format!(
                "cancelling command {id} failed: it has started; wait for its end"
            ))),
            _ => Err(unknown(id)),
        },
        Command::Retry(One { id }) => {
            let handle = ScheduledCommandHandle::new(store, id);
            if handle.retry().await? {
                return match out.json {
                    true => out.value(&json!({ "command": id, "retried": true })),
                    false => out.line(format!("command {id} is due now")),
                };
            }
            match handle.status().await? {
                Some(status) => Err(Failure::Problem(format!(
                    "retrying command {id} failed: it is {}; only a parked command can be retried",
                    status.state
                ))),
                None => Err(unknown(id)),
            }
        }
    }
}

fn unknown(id: Uuid) -> Failure {
    Failure::Refused(format!(
        "unknown scheduled command {id}: it was executed or cancelled, or never stored; list the commands with `storied command list`"
    ))
}

async fn list(store: &Arc<dyn EventStore>, args: List, out: &mut Output) -> Result<(), Failure> {
    let limit = usize::from(args.limit);
    let query = ScheduledQuery { state: args.state.map(Into::into), schedule: args.schedule };
    let mut commands = Vec::new();
    while commands.len() < limit {
        let page = store.scheduled_commands(&query, commands.last(), limit - commands.len()).await?;
        if page.is_empty() {
            break;
        }
        commands.extend(page);
    }
    let more = !store.scheduled_commands(&query, commands.last(), 1).await?.is_empty();
    let commands: Vec<_> = commands.into_iter().map(ScheduledCommandStatus::from).collect();
    if out.json {
        return out.value(&json!({ "commands": commands, "more": more }));
    }
    if commands.is_empty() {
        return out.line("no scheduled commands");
    }
    let now = Utc::now();
    let row = |command: ScheduledCommandStatus| {
        [
            due(command.due_at),
            left(command.due_at - now),
            command.target,
            command.state.to_string(),
            command.schedule.unwrap_or_default(),
            command.id.to_string(),
            command.reason.unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = commands.into_iter().map(row).collect();
    out.table(["DUE", "IN", "TARGET", "STATE", "SCHEDULE", "COMMAND", "REASON"], &rows)?;
    if more {
        out.line(format!("… the limit of {limit} commands; pass a higher --limit, --state or --schedule"))?;
    }
    Ok(())
}
