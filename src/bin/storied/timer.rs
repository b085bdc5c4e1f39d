//! `storied timer`.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use storied::EventStore;
use storied::process::ProcessOperator;
use storied::store::StoredTimer;

use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::output::Output;

/// Longest time of `--within`: 1,000 years.
const LONGEST: u64 = 1_000 * 366 * 86_400;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Lists the pending timers of processes, by due time
    List(List),
}

#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Only timers of this process
    #[arg(long, value_name = "PROCESS")]
    process: Option<String>,

    /// Only timers that are due within this time, as 90s, 15m, 2h or 3d, by the clock of this machine
    #[arg(long, value_name = "TIME", value_parser = time)]
    within: Option<Duration>,

    /// Maximum number of timers, 1 to 10000
    #[arg(long, default_value_t = 100, value_name = "TIMERS", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    limit: u16,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let Command::List(args) = command;
    let store = from.store().await?;
    if let Some(name) = &args.process {
        ProcessOperator::new(store.clone()).process(name).await?;
    }
    let (timers, more) = read(&*store, &args).await?;
    if out.json {
        return out.value(&json!({ "timers": timers, "more": more }));
    }
    if timers.is_empty() {
        return out.line(match args.within {
            Some(_) => "no timers are due in this time",
            None => "no timers",
        });
    }
    let now = Utc::now();
    let rows: Vec<_> = timers
        .into_iter()
        .map(|timer| {
            // The store resumes work that is left by a timer without a name.
            let name = if timer.name.is_empty() { "(resumption)".to_owned() } else { timer.name };
            [
                due(timer.due_at),
                left(timer.due_at - now),
                timer.process,
                timer.instance,
                format!("v{}", timer.version),
                name,
            ]
        })
        .collect();
    out.table(["DUE", "IN", "PROCESS", "INSTANCE", "VERSION", "TIMER"], &rows)?;
    if more {
        out.line(format!(
            "… the limit of {} timers; pass a higher --limit or a shorter --within",
            args.limit
        ))?;
    }
    Ok(())
}

/// Reads the timers up to the limit. Also returns whether there are more.
async fn read(store: &dyn EventStore, args: &List) -> Result<(Vec<StoredTimer>, bool), Failure> {
    let (process, limit) = (args.process.as_deref(), usize::from(args.limit));
    let end = args.within.map(|within| {
        let within = TimeDelta::from_std(within).unwrap_or(TimeDelta::MAX);
        Utc::now().checked_add_signed(within).unwrap_or(DateTime::<Utc>::MAX_UTC)
    });
    let is_within = |timer: &StoredTimer| end.is_none_or(|end| timer.due_at <= end);
    let mut timers = store.timers(process, None, limit).await?;
    let more = if timers.len() < limit {
        false
    } else {
        store.timers(process, timers.last(), 1).await?.first().is_some_and(is_within)
    };
    timers.retain(is_within);
    Ok((timers, more))
}

/// Formats a due time.
pub(crate) fn due(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%SZ").to_string()
}

/// Formats the time that is left until a due time, in its largest unit.
pub(crate) fn left(time: TimeDelta) -> String {
    let seconds = time.num_seconds();
    match seconds {
        ..=0 => "due".to_owned(),
        1..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Parses a time like `2h`.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3_600),
        "d" => Some(86_400),
        _ => None,
    };
    let seconds = number.parse::<u64>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
    match seconds {
        Some(seconds) if seconds <= LONGEST => Ok(Duration::from_secs(seconds)),
        _ => Err("expected a time like 90s, 15m, 2h or 3d, at most 366000d".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        for (text, seconds) in [("90s", 90), ("15m", 900), ("2h", 7_200), ("3d", 259_200), ("0s", 0)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)));
        }
        for wrong in ["", "2", "h", "-2h", "2 h", "1.5h", "2y", "99999999999999999999s", "400000d", "é"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_time_left_has_its_largest_unit() {
        for (seconds, shown) in
            [(-5, "due"), (0, "due"), (119, "119 s"), (121, "2 min"), (7_300, "2 h"), (259_200, "3 d")]
        {
            assert_eq!(left(TimeDelta::seconds(seconds)), shown);
        }
    }
}
