//! `storied schedule`.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use storied::EventStore;
use storied::schedule::{ScheduleHandle, ScheduleStatus};

use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::output::{Output, counted};
use crate::timer::{due, left, time};

/// Number of schedules in a page.
const PAGE: usize = 1_000;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Lists the recurring schedules, by name
    List(List),
    /// Pauses a schedule: no ticks until it is resumed
    Pause(One),
    /// Resumes a schedule with its next tick from now on
    Resume(One),
    /// Executes the command of a schedule once, now
    Trigger(One),
    /// Executes the command of a schedule for each tick in a time range
    Backfill(Backfill),
    /// Removes a schedule with its waiting commands
    Remove(One),
}

#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Only schedules with a tick within this time, as 90s, 15m, 2h or 3d, by the clock of this machine
    #[arg(long, value_name = "TIME", value_parser = time)]
    upcoming: Option<Duration>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// Name of the schedule
    name: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Backfill {
    /// Name of the schedule
    name: String,

    /// First time, as 2026-11-30T00:00:00Z
    #[arg(long, value_name = "TIME")]
    from: DateTime<Utc>,

    /// Last time
    #[arg(long, value_name = "TIME")]
    to: DateTime<Utc>,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let store = from.store().await?;
    let handle = |name: &str| ScheduleHandle::new(store.clone(), name);
    match command {
        Command::List(args) => list(&store, &args, out).await,
        Command::Pause(One { name }) => {
            handle(&name).pause().await?;
            report(&handle(&name), "paused", out).await
        }
        Command::Resume(One { name }) => {
            handle(&name).resume().await?;
            report(&handle(&name), "resumed", out).await
        }
        Command::Trigger(One { name }) => {
            let id = handle(&name).trigger().await?;
            if out.json {
                return out.value(&json!({ "schedule": name, "command": id }));
            }
            out.line(format!("triggered {name}: command {id} is due now"))
        }
        Command::Backfill(Backfill { from, to, .. }) if from > to => {
            Err(Failure::Usage("--from is after --to".to_owned()))
        }
        Command::Backfill(Backfill { name, from, to }) => {
            let ticks = handle(&name).backfill(from..=to).await?;
            if out.json {
                return out.value(&json!({ "schedule": name, "ticks": ticks }));
            }
            out.line(format!(
                "{} of {name} due now, except those that are stored already",
                counted(ticks, "tick")
            ))
        }
        Command::Remove(One { name }) => match handle(&name).remove().await? {
            true if out.json => out.value(&json!({ "schedule": name, "removed": true })),
            true => out.line(format!("removed {name}")),
            false => Err(Failure::Refused(format!(
                "unknown schedule {name:?}; list the names with `storied schedule list`"
            ))),
        },
    }
}

async fn report(handle: &ScheduleHandle, change: &str, out: &mut Output) -> Result<(), Failure> {
    let status = handle.status().await?;
    if out.json {
        return out.value(&json!({ "schedule": status }));
    }
    let next = status.and_then(|status| status.next_at);
    let next = next.map(|at| format!("; the next tick is at {}", due(at))).unwrap_or_default();
    out.line(format!("{change} {}{next}", handle.name()))
}

async fn list(store: &Arc<dyn EventStore>, args: &List, out: &mut Output) -> Result<(), Failure> {
    let end = args.upcoming.map(|within| {
        let within = TimeDelta::from_std(within).unwrap_or(TimeDelta::MAX);
        Utc::now().checked_add_signed(within).unwrap_or(DateTime::<Utc>::MAX_UTC)
    });
    let (mut schedules, mut undecodable) = (Vec::new(), Vec::new());
    let mut after = None::<String>;
    loop {
        let page = store.schedules(after.as_deref(), PAGE).await?;
        for stored in &page {
            let status = match ScheduleStatus::of(stored) {
                Ok(status) => status,
                // For example because a newer version wrote it.
                Err(error) => {
                    undecodable.push(error.to_string());
                    continue;
                }
            };
            if end.is_none_or(|end| status.next_at.is_some_and(|at| at <= end)) {
                schedules.push(status);
            }
        }
        match page.last() {
            Some(last) if page.len() == PAGE => after = Some(last.name.clone()),
            _ => break,
        }
    }
    if out.json {
        return out.value(&json!({ "schedules": schedules, "undecodable": undecodable }));
    }
    for error in &undecodable {
        out.line(error)?;
    }
    if schedules.is_empty() && !undecodable.is_empty() {
        return Ok(());
    }
    if schedules.is_empty() {
        return out.line(match args.upcoming {
            Some(_) => "no schedule has a tick in this time",
            None => "no schedules",
        });
    }
    let now = Utc::now();
    let row = |status: ScheduleStatus| {
        let next = match status.next_at {
            Some(at) => format!("{} ({})", due(at), left(at - now)),
            None if status.paused => "paused".to_owned(),
            None => "none".to_owned(),
        };
        [
            status.name,
            status.timing,
            status.target,
            next,
            status.last_at.map_or("never".to_owned(), due),
            status.created.to_string(),
            status.skipped.to_string(),
            status.missed.to_string(),
        ]
    };
    let rows: Vec<_> = schedules.into_iter().map(row).collect();
    out.table(["SCHEDULE", "TIMING", "TARGET", "NEXT", "LAST", "CREATED", "SKIPPED", "MISSED"], &rows)
}
