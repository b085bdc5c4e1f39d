//! The due ticks of a recurring schedule.

use chrono::{DateTime, Utc};

use super::definition::{Definition, tick_id};
use super::error::ScheduleError;
use super::recurrence::{Overlap, Ticker};
use crate::store::{DueTime, NewScheduledCommand};
use crate::time::later;

/// Maximum number of ticks that a step considers; the next step considers the others.
const STEP: usize = 1_000;

/// Maximum number of ticks that a pause or a replacement counts as missed: a day of seconds.
const MOST_COUNTED: usize = 86_400;

/// Records the ticks up to `now` in the definition, and returns their commands.
///
/// `busy`: whether a command of an earlier tick has no answer yet.
pub(super) fn tick(
    definition: &mut Definition,
    name: &str,
    now: DateTime<Utc>,
    busy: bool,
) -> Result<Vec<NewScheduledCommand>, ScheduleError> {
    let ticker = definition.timing.ticker()?;
    let mut commands = Vec::new();
    let mut next = ticker.next_after(definition.done_to);
    for _ in 0..STEP {
        let Some(at) = next.filter(|at| *at <= now) else { break };
        next = ticker.next_after(at);
        let superseded = definition.overlap == Overlap::Skip && next.is_some_and(|next| next <= now);
        if superseded || later(at, definition.catch_up()) < now {
            definition.missed += 1;
        } else if definition.overlap == Overlap::Skip && busy {
            definition.skipped += 1;
        } else {
            definition.created += 1;
            definition.last_at = Some(at);
            commands.push(command_of(definition, name, at)?);
        }
        definition.done_to = at;
    }
    Ok(commands)
}

/// Records the ticks up to `now` as missed, because the schedule is paused or replaced.
pub(super) fn count_missed(definition: &mut Definition, now: DateTime<Utc>) -> Result<(), ScheduleError> {
    let ticker = definition.timing.ticker()?;
    let missed = between(&ticker, definition.done_to, now).take(MOST_COUNTED).count();
    definition.missed += missed as u64;
    definition.done_to = definition.done_to.max(now);
    Ok(())
}

/// Returns the commands of the ticks after `from` up to `to`.
///
/// They may be stored or executed already.
pub(super) fn backfill(
    definition: &Definition,
    name: &str,
    from: DateTime<Utc>,
    to: DateTime<Utc>,
) -> Result<Vec<NewScheduledCommand>, ScheduleError> {
    let ticker = definition.timing.ticker()?;
    let times: Vec<_> = between(&ticker, from, to).take(STEP + 1).collect();
    if times.len() > STEP {
        return Err(ScheduleError::TooManyTicks { name: name.to_owned(), limit: STEP });
    }
    times.into_iter().map(|at| command_of(definition, name, at)).collect()
}

fn between(
    ticker: &Ticker,
    from: DateTime<Utc>,
    to: DateTime<Utc>,
) -> impl Iterator<Item = DateTime<Utc>> + '_ {
    std::iter::successors(ticker.next_after(from), |at| ticker.next_after(*at))
        .take_while(move |at| *at <= to)
}

fn command_of(
    definition: &Definition,
    name: &str,
    at: DateTime<Utc>,
) -> Result<NewScheduledCommand, ScheduleError> {
    Ok(definition.command.to_store(tick_id(name, at), DueTime::At(at), Some(name))?)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::command::StoredCommand;
    use super::super::recurrence::Recurrence;
    use super::*;
    use crate::command::{ErasedCommand, Expected, Kind};
    use crate::event::Metadata;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(second, 0).unwrap()
    }

    fn every_second(schedule: impl FnOnce(Recurrence) -> Recurrence) -> Definition {
        let command = ErasedCommand {
            id: uuid::Uuid::nil(),
            kind: Kind::Handler,
            name: "close".into(),
            key: None,
            payload: vec![0xa0],
            metadata: Metadata::default(),
            expected: Expected::Any,
        };
        let command = StoredCommand::of(&command, None).unwrap();
        Definition::new(schedule(Recurrence::every(SECOND).unwrap()), command, at(0))
    }

    fn run(definition: &mut Definition, now: i64, busy: bool) -> Vec<DueTime> {
        tick(definition, "close", at(now), busy).unwrap().into_iter().map(|command| command.due).collect()
    }

    fn counts(definition: &Definition) -> [u64; 3] {
        [definition.created, definition.skipped, definition.missed]
    }

    #[test]
    fn a_tick_is_a_command_once() {
        let mut one = every_second(|it| it);
        assert_eq!(run(&mut one, 0, false), []);
        assert_eq!(run(&mut one, 1, false), [DueTime::At(at(1))]);
        assert_eq!(run(&mut one, 1, false), []);
        assert_eq!(run(&mut one, 2, true), []);
        assert_eq!((counts(&one), one.last_at, one.done_to), ([1, 1, 0], Some(at(1)), at(2)));
    }

    #[test]
    fn after_an_outage_the_newest_tick_runs_or_all_that_are_not_too_late() {
        let mut skip = every_second(|it| it);
        assert_eq!(run(&mut skip, 10, false), [DueTime::At(at(10))]);
        assert_eq!(counts(&skip), [1, 0, 9]);
        let mut allow = every_second(|it| it.overlap(Overlap::Allow).catch_up(3 * SECOND));
        assert_eq!(run(&mut allow, 10, true), [7, 8, 9, 10].map(|it| DueTime::At(at(it))));
        assert_eq!(counts(&allow), [4, 0, 6]);
        let mut late = every_second(|it| it.catch_up(Duration::ZERO));
        let now = at(5) + chrono::TimeDelta::microseconds(1);
        assert_eq!(tick(&mut late, "close", now, false).unwrap(), []);
        assert_eq!(counts(&late), [0, 0, 5]);
    }

    #[test]
    fn a_long_outage_is_recorded_in_steps() {
        let mut one = every_second(|it| it);
        assert_eq!(run(&mut one, 2_500, false), []);
        assert_eq!((counts(&one), one.done_to), ([0, 0, 1_000], at(1_000)));
        run(&mut one, 2_500, false);
        assert_eq!(run(&mut one, 2_500, false), [DueTime::At(at(2_500))]);
        assert_eq!(counts(&one), [1, 0, 2_499]);
    }

    #[test]
    fn a_pause_counts_due_ticks_as_missed() {
        let mut one = every_second(|it| it);
        count_missed(&mut one, at(3)).unwrap();
        assert_eq!((counts(&one), one.done_to), ([0, 0, 3], at(3)));
        count_missed(&mut one, at(1)).unwrap();
        assert_eq!((counts(&one), one.done_to), ([0, 0, 3], at(3)));
    }

    #[test]
    fn a_backfill_is_limited() {
        let one = every_second(|it| it);
        assert_eq!(backfill(&one, "close", at(-2), at(1)).unwrap().len(), 3);
        assert!(matches!(
            backfill(&one, "close", at(0), at(1_001)),
            Err(ScheduleError::TooManyTicks { limit: 1_000, .. })
        ));
    }
}
