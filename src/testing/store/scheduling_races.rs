//! Scheduled commands and schedules under concurrent callers.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures_util::future::join_all;

use uuid::Uuid;

use super::Database;
use super::fixture::Dice;
use super::scheduled_commands::{
    LATER, NOW, all, at, command, done, id, numbers, parked, schedule, seconds, start,
};
use super::schedules::{revision, tick};
use crate::store::{NewScheduledCommand, ScheduledEnd, ScheduledOutcome, ScheduledState};

/// Checks that concurrent callers start each command once, and all of them.
pub async fn one_of_many_rivals_starts_a_command(database: Database) {
    const COMMANDS: u128 = 300;
    let stores = [database.open().await, database.open().await];
    let rivals = (0..6_u128).map(|rival| {
        let store = stores[usize::from(rival % 2 == 0)].clone();
        tokio::spawn(async move {
            let (mut dice, mut started) = (Dice::new(), Vec::new());
            let own = (1..=COMMANDS / 6).map(|number| command(rival * 1_000 + number, NOW));
            for new in own {
                schedule(&*store, vec![new]).await;
                let limit = usize::try_from(dice.below(8)).unwrap();
                started.extend(numbers(&start(&*store, limit).await.commands));
            }
            loop {
                let found = start(&*store, 20).await;
                match (found.commands.is_empty(), found.next_in) {
                    (true, None) => break started,
                    (true, Some(wait)) => tokio::time::sleep(wait.min(Duration::from_millis(5))).await,
                    (false, _) => started.extend(numbers(&found.commands)),
                }
            }
        })
    });
    let mut started = Vec::new();
    for rival in join_all(rivals).await {
        started.extend(rival.unwrap());
    }
    let unique: HashSet<_> = started.iter().collect();
    assert_eq!((started.len(), unique.len()), (COMMANDS as usize, COMMANDS as usize));
    assert!(all(&*stores[0]).await.iter().all(|it| it.state == ScheduledState::Started));
}

/// Checks that a command is either cancelled or started, under concurrent callers.
pub async fn cancelling_races_with_starting(database: Database) {
    let stores = [database.open().await, database.open().await];
    let (mut cancelled, mut started) = (0, 0);
    for round in 0..60_u128 {
        schedule(&*stores[0], vec![command(round, NOW)]).await;
        let pause = Duration::from_micros(Dice::new().below(600));
        let starting = async {
            tokio::time::sleep(pause).await;
            start(&*stores[0], 10).await.commands
        };
        let (found, before) = tokio::join!(starting, stores[1].cancel_command(id(round)));
        let before = before.unwrap().expect("the command was stored");
        match before.state {
            ScheduledState::Waiting => {
                cancelled += 1;
                assert!(found.is_empty(), "cancelled and started");
                assert!(all(&*stores[0]).await.is_empty());
            }
            ScheduledState::Started => {
                started += 1;
                assert_eq!(numbers(&found), [round]);
                stores[0].end_commands(vec![done(round)], None).await.unwrap();
            }
            ScheduledState::Parked => panic!("{before:?}"),
        }
    }
    assert_eq!(cancelled + started, 60);
}

/// Checks that concurrent callers with common commands, in any order, all succeed and agree.
pub async fn rivals_store_a_command_once(database: Database) {
    let stores = [database.open().await, database.open().await];
    let rivals = (0..8_u128).map(|rival| {
        let store = stores[usize::from(rival % 2 == 0)].clone();
        tokio::spawn(async move {
            let mut dice = Dice::new();
            let mut answers = HashMap::new();
            for round in 0..10 {
                let mut order: Vec<u128> = (0..20).collect();
                for end in (1..order.len()).rev() {
                    order.swap(end, usize::try_from(dice.below(end as u64 + 1)).unwrap());
                }
                let target = format!("rival-{rival}");
                let new = order.iter().map(|number| NewScheduledCommand {
                    target: target.clone(),
                    ..command(round * 100 + number, LATER)
                });
                let answer = store.schedule_commands(new.collect()).await.unwrap();
                assert_eq!(
                    numbers(&answer),
                    order.iter().map(|number| round * 100 + number).collect::<Vec<_>>()
                );
                answers.extend(answer.into_iter().map(|it| (it.id, it)));
            }
            answers
        })
    });
    let answers: Vec<_> = join_all(rivals).await.into_iter().map(Result::unwrap).collect();
    let stored: HashMap<_, _> = all(&*stores[0]).await.into_iter().map(|it| (it.id, it)).collect();
    assert_eq!(stored.len(), 200);
    assert!(answers.iter().all(|answers| *answers == stored));
}

/// Checks that of concurrent writers of a revision one succeeds, and that only its command is stored.
pub async fn one_of_many_rivals_writes_a_schedule(database: Database) {
    let stores = [database.open().await, database.open().await];
    for number in 1..=20_u64 {
        let rivals = (0..6_u64).map(|rival| {
            let store = stores[usize::from(rival % 2 == 0)].clone();
            tokio::spawn(async move {
                let next = seconds(i64::try_from(rival).unwrap());
                let own = tick(u128::from(number * 10 + rival), "s", LATER);
                let written = store.write_schedule(revision("s", number, Some(next)), vec![own]).await;
                written.unwrap().then_some(rival)
            })
        });
        let winners: Vec<u64> =
            join_all(rivals).await.into_iter().filter_map(|rival| rival.unwrap()).collect();
        assert_eq!(winners.len(), 1, "{winners:?}");
        let stored = stores[0].schedule("s").await.unwrap().unwrap();
        let next = seconds(i64::try_from(winners[0]).unwrap());
        assert_eq!((stored.revision, stored.next_at), (number, Some(next)));
        let last = all(&*stores[1]).await.into_iter().map(|it| it.id.as_u128()).max();
        assert_eq!(last, Some(u128::from(number * 10 + winners[0])));
        assert_eq!(all(&*stores[1]).await.len(), usize::try_from(number).unwrap());
    }
}

/// Checks that a tick is either started or removed with its schedule, under concurrent callers.
pub async fn removal_races_with_starting(database: Database) {
    let stores = [database.open().await, database.open().await];
    for round in 0..40_u128 {
        let name = format!("s{round}");
        let ticks = (0..8).map(|number| tick(round * 100 + number, &name, NOW)).collect();
        assert!(stores[0].write_schedule(revision(&name, 1, None), ticks).await.unwrap());
        let pause = Duration::from_micros(Dice::new().below(800));
        let starting = async {
            tokio::time::sleep(pause).await;
            stores[0].start_due_commands(4).await.unwrap().commands
        };
        let (started, removed) = tokio::join!(starting, stores[1].remove_schedule(&name, 1));
        assert!(removed.unwrap());
        let left = all(&*stores[1]).await;
        assert!(left.iter().all(|it| it.state == ScheduledState::Started), "{left:?}");
        assert_eq!(numbers(&left), numbers(&started));
        stores[1].end_commands(left.iter().map(|it| done(it.id.as_u128())).collect(), None).await.unwrap();
    }
}

/// Checks that a postponed command waits again, by the store's clock.
pub async fn a_command_is_postponed(database: Database) {
    let store = database.open().await;
    schedule(&*store, vec![command(1, at(1)), command(2, at(2)), command(3, LATER)]).await;
    start(&*store, 2).await;
    let wait = Duration::from_millis(300);
    let postponed = |number| ScheduledEnd { id: id(number), outcome: ScheduledOutcome::Postponed(wait) };
    store.end_commands(vec![postponed(1), parked(2, "no")], None).await.unwrap();
    // Neither a waiting nor a parked command.
    store.end_commands(vec![postponed(1), postponed(2), postponed(3), postponed(9)], None).await.unwrap();
    let left = all(&*store).await;
    let state = |number| left.iter().find(|command| command.id == id(number)).unwrap().state;
    assert_eq!(
        [1, 2, 3].map(state),
        [ScheduledState::Waiting, ScheduledState::Parked, ScheduledState::Waiting]
    );
    assert!(start(&*store, 10).await.commands.is_empty());
    tokio::time::sleep(wait).await;
    assert_eq!(numbers(&start(&*store, 10).await.commands), [1]);
}

/// Checks that a stale lease holder parks and postpones nothing.
pub async fn ends_of_a_stale_holder_are_ignored(database: Database) {
    let store = database.open().await;
    let ttl = Duration::from_secs(60);
    let acquire = async |owner| store.acquire_lease("scheduler", Uuid::from_u128(owner), ttl).await.unwrap();
    let stale = acquire(1).await.unwrap();
    store.release_lease(&stale).await.unwrap();
    let current = acquire(2).await.unwrap();
    schedule(&*store, (1..=3).map(|number| command(number, at(1))).collect()).await;
    start(&*store, 3).await;
    let postponed = |number| ScheduledEnd { id: id(number), outcome: ScheduledOutcome::Postponed(ttl) };
    let ends = || vec![done(1), parked(2, "no"), postponed(3)];
    store.end_commands(ends(), Some(stale)).await.unwrap();
    let states: Vec<_> = all(&*store).await.into_iter().map(|it| (it.id, it.state)).collect();
    assert_eq!(states, [2, 3].map(|number| (id(number), ScheduledState::Started)));
    store.end_commands(ends(), Some(current)).await.unwrap();
    let states: Vec<_> = all(&*store).await.into_iter().map(|it| (it.id, it.state)).collect();
    assert_eq!(states, [(id(2), ScheduledState::Parked), (id(3), ScheduledState::Waiting)]);
}
