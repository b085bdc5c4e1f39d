//! Checkpoints, parked events, pauses and snapshots.

use bytes::Bytes;

use super::Database;
use super::fixture::{fill, stream, whole_log};
use crate::event::{Position, Version};
use crate::store::{Checkpoint, CheckpointError, EventStore, ParkedEvent, Snapshot};

fn at(position: u64, epoch: u64, mark: u64) -> Checkpoint {
    Checkpoint { position: Position::new(position), epoch, mark }
}

async fn assert_stale(store: &dyn EventStore, name: &str, from: Checkpoint, to: Checkpoint) {
    let before = store.checkpoint(name).await.unwrap();
    match store.save_checkpoint(name, from, to, None).await {
        Err(CheckpointError::Stale { name: of, expected, found }) => {
            assert_eq!((of.as_str(), expected, found), (name, from, before));
        }
        other => panic!("{from:?} to {to:?} at {before:?}: {other:?}"),
    }
    assert_eq!(store.checkpoint(name).await.unwrap(), before);
}

/// Checks that a missing checkpoint is the start of the log, in epoch 0.
pub async fn a_checkpoint_starts_at_the_default(database: Database) {
    let store = database.open().await;
    assert_eq!(store.checkpoint("p").await.unwrap(), Checkpoint::default());
    assert_stale(&*store, "p", at(1, 0, 0), at(2, 0, 0)).await;
    store.save_checkpoint("p", Checkpoint::default(), Checkpoint::default(), None).await.unwrap();
    store.save_checkpoint("p", Checkpoint::default(), at(5, 1, 7), None).await.unwrap();
    assert_eq!(store.checkpoint("p").await.unwrap(), at(5, 1, 7));
    assert_eq!(store.checkpoint("q").await.unwrap(), Checkpoint::default());
    assert_stale(&*store, "p", Checkpoint::default(), at(6, 1, 0)).await;
    assert_eq!(database.open().await.checkpoint("p").await.unwrap(), at(5, 1, 7));
}

/// Checks compare and set: position, epoch and mark must be unchanged.
///
/// A move back is allowed (a reset).
pub async fn a_checkpoint_moves_only_from_where_it_is(database: Database) {
    let store = database.open().await;
    store.save_checkpoint("p", Checkpoint::default(), at(5, 1, 7), None).await.unwrap();
    for wrong in [at(4, 1, 7), at(6, 1, 7), at(5, 0, 7), at(5, 2, 7), at(5, 1, 8), Checkpoint::default()] {
        assert_stale(&*store, "p", wrong, at(9, 3, 9)).await;
    }
    store.save_checkpoint("p", at(5, 1, 7), at(9, 1, 8), None).await.unwrap();
    store.save_checkpoint("p", at(9, 1, 8), at(0, 1, 0), None).await.unwrap();
    assert_eq!(store.checkpoint("p").await.unwrap(), at(0, 1, 0));
}

/// I7: checks that a new lease holder raises the epoch with its first save.
///
/// This fences the old holder.
pub async fn the_epoch_of_a_checkpoint_never_falls(database: Database) {
    let store = database.open().await;
    store.save_checkpoint("p", Checkpoint::default(), at(5, 3, 0), None).await.unwrap();
    assert_stale(&*store, "p", at(5, 3, 0), at(6, 2, 0)).await;
    store.save_checkpoint("p", at(5, 3, 0), at(5, 4, 0), None).await.unwrap();
    assert_stale(&*store, "p", at(5, 3, 0), at(6, 3, 0)).await;
    store.save_checkpoint("p", at(5, 4, 0), at(6, 4, 0), None).await.unwrap();
}

/// Checks that one of many concurrent moves of a checkpoint succeeds.
pub async fn one_of_many_rivals_moves_a_checkpoint(database: Database) {
    let stores = [database.open().await, database.open().await];
    let mut from = Checkpoint::default();
    for round in 1..=10 {
        let rivals: Vec<_> = (0..8)
            .map(|rival| {
                let store = stores[rival as usize % 2].clone();
                let to = at(round, round, rival);
                tokio::spawn(async move { store.save_checkpoint("p", from, to, None).await.map(|()| to) })
            })
            .collect();
        let mut winners = Vec::new();
        for rival in rivals {
            match rival.await.unwrap() {
                Ok(to) => winners.push(to),
                Err(CheckpointError::Stale { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(winners.len(), 1);
        from = winners[0];
        assert_eq!(stores[0].checkpoint("p").await.unwrap(), from);
    }
}

/// Checks that an event is parked if and only if the checkpoint moved.
pub async fn events_are_parked_with_the_checkpoint(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("it's 日本"), 2).await;
    let log = whole_log(&*store).await;
    let parked = ParkedEvent::new(&log[0], "no such country: 'ß'".into(), 5);
    let to = Checkpoint { position: log[0].position, epoch: 1, mark: 0 };

    let refused = store.save_checkpoint("p", at(77, 0, 0), to, Some(parked.clone())).await;
    assert!(matches!(refused, Err(CheckpointError::Stale { .. })));
    assert!(store.parked("p", 10).await.unwrap().is_empty());

    store.save_checkpoint("p", Checkpoint::default(), to, Some(parked.clone())).await.unwrap();
    assert_eq!(store.checkpoint("p").await.unwrap(), to);
    let found = database.open().await.parked("p", 10).await.unwrap();
    assert_eq!(found.len(), 1);
    // Databases keep microseconds.
    let age = (found[0].parked_at - parked.parked_at).num_microseconds().unwrap().abs();
    assert!(age <= 1, "{age} µs");
    assert_eq!(ParkedEvent { parked_at: parked.parked_at, ..found[0].clone() }, parked);
    assert!(store.parked("q", 10).await.unwrap().is_empty());
}

/// Checks the list of parked events: oldest first, limited, each event once with its last attempt.
pub async fn parked_events_are_listed_and_removed(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("a"), 5).await;
    let log = whole_log(&*store).await;
    let mut checkpoint = Checkpoint::default();
    for (attempts, index) in [3, 1, 4, 1, 0].into_iter().enumerate() {
        let to = Checkpoint { mark: checkpoint.mark + 1, ..checkpoint };
        let parked = ParkedEvent::new(&log[index], format!("attempt {attempts}"), attempts as u32);
        store.save_checkpoint("p", checkpoint, to, Some(parked)).await.unwrap();
        checkpoint = to;
    }
    let listed = async |limit| -> Vec<(Position, u32)> {
        let parked = store.parked("p", limit).await.unwrap();
        parked.into_iter().map(|parked| (parked.position, parked.attempts)).collect()
    };
    let wanted = [(log[0].position, 4), (log[1].position, 3), (log[3].position, 0), (log[4].position, 2)];
    assert_eq!(listed(10).await, wanted);
    assert_eq!(listed(2).await, wanted[..2]);
    assert!(store.remove_parked("p", log[1].position).await.unwrap());
    assert!(!store.remove_parked("p", log[1].position).await.unwrap());
    assert!(!store.remove_parked("q", log[0].position).await.unwrap());
    assert_eq!(listed(10).await, [wanted[0], wanted[2], wanted[3]]);
}

/// Checks that the pause flag is in the store, and so is shared by all nodes.
pub async fn projections_are_paused_and_resumed(database: Database) {
    let store = database.open().await;
    let other = database.open().await;
    assert!(!store.paused().await.unwrap().contains("p"));
    for _ in 0..2 {
        store.set_paused("p", true).await.unwrap();
        assert!(other.paused().await.unwrap().contains("p"));
    }
    assert!(!other.paused().await.unwrap().contains("q"));
    for _ in 0..2 {
        other.set_paused("p", false).await.unwrap();
        assert!(!store.paused().await.unwrap().contains("p"));
    }
}

/// Checks that the newest snapshot of a revision wins, and that another revision always replaces.
pub async fn snapshots_are_kept_and_replaced(database: Database) {
    let store = database.open().await;
    assert!(store.snapshot(&stream("a")).await.unwrap().is_none());
    let save = async |version, revision, state: &'static [u8]| {
        let snapshot =
            Snapshot { version: Version::new(version), revision, state: Bytes::from_static(state) };
        store.save_snapshot(&stream("a"), snapshot).await.unwrap();
    };
    let found = async || {
        let snapshot = store.snapshot(&stream("a")).await.unwrap().unwrap();
        (snapshot.version.get(), snapshot.revision, snapshot.state)
    };
    save(10, 1, b"ten").await;
    assert_eq!(found().await, (10, 1, Bytes::from_static(b"ten")));
    save(20, 1, b"twenty\0").await;
    assert_eq!(found().await, (20, 1, Bytes::from_static(b"twenty\0")));
    save(15, 1, b"late").await;
    assert_eq!(found().await, (20, 1, Bytes::from_static(b"twenty\0")));
    save(5, 2, b"").await;
    assert_eq!(found().await, (5, 2, Bytes::new()));
    save(30, 1, b"back").await;
    assert_eq!(found().await, (30, 1, Bytes::from_static(b"back")));
    assert!(store.snapshot(&stream("b")).await.unwrap().is_none());
    assert_eq!(
        database.open().await.snapshot(&stream("a")).await.unwrap().unwrap().version,
        Version::new(30)
    );
}
