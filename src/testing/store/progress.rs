//! Progress and control of projections, the checkpoint of the publisher, and snapshots.

use bytes::Bytes;

use super::Database;
use super::fixture::{fill, stream, whole_log};
use crate::event::{Position, Version};
use crate::store::{
    Checkpoint, CheckpointError, CheckpointKey, ControlChange, EventStore, ParkedEvent, ProgressWrite,
    ProjectionControl, PublisherCheckpoint, Request, Snapshot, StoredProjection, StoredRequest,
};

fn at(position: u64, epoch: u64, generation: u64) -> Checkpoint {
    Checkpoint { position: Position::new(position), epoch, generation, delivered: Position::START }
}

fn key(projection: &str) -> CheckpointKey {
    CheckpointKey::new(projection)
}

fn moves(key: &CheckpointKey, from: Checkpoint, to: Checkpoint) -> ProgressWrite {
    ProgressWrite::Checkpoint { key: key.clone(), from, to }
}

async fn save(
    store: &dyn EventStore,
    key: &CheckpointKey,
    from: Checkpoint,
    to: Checkpoint,
) -> Result<(), CheckpointError> {
    store.write_progress(vec![moves(key, from, to)]).await
}

async fn assert_stale(store: &dyn EventStore, name: &str, from: Checkpoint, to: Checkpoint) {
    let before = store.checkpoint(&key(name)).await.unwrap();
    match save(store, &key(name), from, to).await {
        Err(CheckpointError::Stale { key: of, expected, found }) => {
            assert_eq!((of, expected, found), (key(name), from, before));
        }
        other => panic!("{from:?} to {to:?} at {before:?}: {other:?}"),
    }
    assert_eq!(store.checkpoint(&key(name)).await.unwrap(), before);
}

/// Checks that a missing checkpoint is the start of the log, in epoch 0.
pub async fn a_checkpoint_starts_at_the_default(database: Database) {
    let store = database.open().await;
    let p = key("p");
    assert_eq!(store.checkpoint(&p).await.unwrap(), Checkpoint::default());
    assert_stale(&*store, "p", at(1, 0, 0), at(2, 0, 0)).await;
    save(&*store, &p, Checkpoint::default(), Checkpoint::default()).await.unwrap();
    save(&*store, &p, Checkpoint::default(), at(5, 1, 7)).await.unwrap();
    assert_eq!(store.checkpoint(&p).await.unwrap(), at(5, 1, 7));
    assert_eq!(store.checkpoint(&key("q")).await.unwrap(), Checkpoint::default());
    assert_stale(&*store, "p", Checkpoint::default(), at(6, 1, 0)).await;
    assert_eq!(database.open().await.checkpoint(&p).await.unwrap(), at(5, 1, 7));
}

/// Checks that partitions and versions have checkpoints of their own, which are listed.
pub async fn each_partition_and_version_has_a_checkpoint(database: Database) {
    let store = database.open().await;
    let keys = [(0, 0), (0, 1), (1, 0), (1, 1)];
    let keys = keys.map(|(version, partition)| CheckpointKey { version, partition, ..key("p") });
    for (position, key) in (1..).zip(&keys) {
        let to = Checkpoint { delivered: Position::new(9), ..at(position, 1, 0) };
        save(&*store, key, Checkpoint::default(), to).await.unwrap();
    }
    save(&*store, &key("pp"), Checkpoint::default(), at(7, 1, 0)).await.unwrap();
    let found = store.checkpoints("p").await.unwrap();
    assert_eq!(found.iter().map(|(key, _)| key).collect::<Vec<_>>(), keys.iter().collect::<Vec<_>>());
    for (position, (key, checkpoint)) in (1..).zip(found) {
        assert_eq!(checkpoint, Checkpoint { delivered: Position::new(9), ..at(position, 1, 0) });
        assert_eq!(store.checkpoint(&key).await.unwrap(), checkpoint);
    }
    assert!(store.checkpoints("q").await.unwrap().is_empty());
}

/// Checks compare and set: position, epoch and generation must be unchanged.
///
/// A move back is allowed (a reset).
pub async fn a_checkpoint_moves_only_from_where_it_is(database: Database) {
    let store = database.open().await;
    let p = key("p");
    save(&*store, &p, Checkpoint::default(), at(5, 1, 7)).await.unwrap();
    for wrong in [at(4, 1, 7), at(6, 1, 7), at(5, 0, 7), at(5, 2, 7), at(5, 1, 8), Checkpoint::default()] {
        assert_stale(&*store, "p", wrong, at(9, 3, 9)).await;
    }
    save(&*store, &p, at(5, 1, 7), at(9, 1, 8)).await.unwrap();
    save(&*store, &p, at(9, 1, 8), at(0, 1, 0)).await.unwrap();
    assert_eq!(store.checkpoint(&p).await.unwrap(), at(0, 1, 0));
}

/// I7: checks that a new lease holder raises the epoch with its first save.
///
/// This fences the old holder.
pub async fn the_epoch_of_a_checkpoint_never_falls(database: Database) {
    let store = database.open().await;
    let p = key("p");
    save(&*store, &p, Checkpoint::default(), at(5, 3, 0)).await.unwrap();
    assert_stale(&*store, "p", at(5, 3, 0), at(6, 2, 0)).await;
    save(&*store, &p, at(5, 3, 0), at(5, 4, 0)).await.unwrap();
    assert_stale(&*store, "p", at(5, 3, 0), at(6, 3, 0)).await;
    save(&*store, &p, at(5, 4, 0), at(6, 4, 0)).await.unwrap();
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
                tokio::spawn(async move { save(&*store, &key("p"), from, to).await.map(|()| to) })
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
        assert_eq!(stores[0].checkpoint(&key("p")).await.unwrap(), from);
    }
}

/// Checks that an event is parked if and only if the checkpoint moved.
pub async fn events_are_parked_with_the_checkpoint(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("it's 日本"), 2).await;
    let log = whole_log(&*store).await;
    let parked = ParkedEvent::new(&log[0], "no such country: 'ß'".into(), 5);
    let to = Checkpoint { position: log[0].position, ..at(0, 1, 0) };
    let p = key("p");
    let park = || ProgressWrite::Park { key: key("p"), event: parked.clone() };

    for writes in [[moves(&p, at(77, 0, 0), to), park()], [park(), moves(&p, at(77, 0, 0), to)]] {
        let refused = store.write_progress(writes.to_vec()).await;
        assert!(matches!(refused, Err(CheckpointError::Stale { .. })));
        assert!(store.parked(&p, Position::START, 10).await.unwrap().is_empty());
    }

    store.write_progress(vec![moves(&p, Checkpoint::default(), to), park()]).await.unwrap();
    assert_eq!(store.checkpoint(&p).await.unwrap(), to);
    let found = database.open().await.parked(&p, Position::START, 10).await.unwrap();
    assert_eq!(found.len(), 1);
    // Databases keep microseconds.
    let age = (found[0].parked_at - parked.parked_at).num_microseconds().unwrap().abs();
    assert!(age <= 1, "{age} µs");
    assert_eq!(ParkedEvent { parked_at: parked.parked_at, ..found[0].clone() }, parked);
    for other in [key("q"), CheckpointKey { version: 1, ..key("p") }, CheckpointKey { partition: 1, ..p }] {
        assert!(store.parked(&other, Position::START, 10).await.unwrap().is_empty());
    }
}

/// Checks the list of parked events: oldest first, limited, each event once with its last attempt.
pub async fn parked_events_are_listed_and_removed(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("a"), 5).await;
    let log = whole_log(&*store).await;
    let p = key("p");
    for (attempts, index) in [3, 1, 4, 1, 0].into_iter().enumerate() {
        let event = ParkedEvent::new(&log[index], format!("attempt {attempts}"), attempts as u32);
        store.write_progress(vec![ProgressWrite::Park { key: p.clone(), event }]).await.unwrap();
    }
    let listed = async |from, limit| -> Vec<(Position, u32)> {
        let parked = store.parked(&p, from, limit).await.unwrap();
        parked.into_iter().map(|parked| (parked.position, parked.attempts)).collect()
    };
    let wanted = [(log[0].position, 4), (log[1].position, 3), (log[3].position, 0), (log[4].position, 2)];
    assert_eq!(listed(Position::START, 10).await, wanted);
    assert_eq!(listed(Position::START, 2).await, wanted[..2]);
    assert_eq!(listed(log[1].position, 2).await, wanted[1..3]);
    let unpark = async |key: &CheckpointKey, position| {
        store.write_progress(vec![ProgressWrite::Unpark { key: key.clone(), position }]).await
    };
    let missing = |result| matches!(result, Err(CheckpointError::Missing { .. }));
    unpark(&p, log[1].position).await.unwrap();
    assert!(missing(unpark(&p, log[1].position).await));
    assert!(missing(unpark(&key("q"), log[0].position).await));
    assert_eq!(listed(Position::START, 10).await, [wanted[0], wanted[2], wanted[3]]);
    store.write_progress(vec![ProgressWrite::UnparkAll { key: key("q") }]).await.unwrap();
    assert_eq!(listed(Position::START, 10).await.len(), 3);
    store.write_progress(vec![ProgressWrite::UnparkAll { key: p.clone() }]).await.unwrap();
    assert!(listed(Position::START, 10).await.is_empty());
}

/// Checks compare and set of layout, versions and start position.
pub async fn a_projection_changes_only_from_where_it_is(database: Database) {
    let store = database.open().await;
    let none = StoredProjection::default();
    assert_eq!(store.projection("p").await.unwrap(), none);
    let change = async |from, to| {
        store.write_progress(vec![ProgressWrite::Projection { name: "p".into(), from, to }]).await
    };
    let to = StoredProjection {
        partitions: 4,
        live_version: 2,
        building_version: Some(3),
        start_position: Some(Position::START),
        revision: 0,
    };
    change(none, to).await.unwrap();
    let first = StoredProjection { revision: 1, ..to };
    assert_eq!(database.open().await.projection("p").await.unwrap(), first);
    for wrong in [none, StoredProjection { revision: 2, ..first }] {
        let changed = change(wrong, none).await;
        assert!(matches!(changed, Err(CheckpointError::Changed { .. })), "{changed:?}");
    }
    let ended = StoredProjection { building_version: None, start_position: None, ..first };
    change(first, ended).await.unwrap();
    assert_eq!(store.projection("p").await.unwrap(), StoredProjection { revision: 2, ..ended });
    assert_eq!(store.projection("q").await.unwrap(), none);
}

/// Checks that requests are listed in order, replaced, refused and removed.
pub async fn requests_are_listed_refused_and_removed(database: Database) {
    let store = database.open().await;
    let retry = |position| Request::Retry(Position::new(position));
    let order = [Request::CancelRebuild, Request::Rebuild, Request::Reset, retry(2), retry(10)];
    let mut stored = Vec::new();
    for request in order.into_iter().rev() {
        let request = StoredRequest::new(request);
        let add = || ProgressWrite::AddRequest { projection: "p".into(), request: request.clone() };
        store.write_progress(vec![add()]).await.unwrap();
        stored.insert(0, request);
    }
    let listed = async |from, limit| store.requests("p", from, limit).await.unwrap();
    let of = |found: &[StoredRequest]| found.iter().map(|found| found.request).collect::<Vec<_>>();
    let found = listed(Request::FIRST, 10).await;
    assert_eq!(of(&found), order);
    let ids = |found: &[StoredRequest]| found.iter().map(|found| found.id).collect::<Vec<_>>();
    assert_eq!(ids(&found), ids(&stored));
    assert_eq!(of(&listed(Request::Reset, 2).await), [Request::Reset, retry(2)]);
    assert_eq!(of(&listed(retry(3), 2).await), [retry(10)]);
    assert!(store.requests("q", Request::FIRST, 10).await.unwrap().is_empty());

    let reset = |id, reason: &str| ProgressWrite::RefuseRequest {
        projection: "p".into(),
        request: Request::Reset,
        id,
        reason: reason.into(),
    };
    let missing = |result| matches!(result, Err(CheckpointError::Missing { .. }));
    let first = stored[2].id;
    store.write_progress(vec![reset(first, "no\0")]).await.unwrap();
    assert!(listed(Request::Reset, 1).await[0].refused_reason.as_ref().unwrap().starts_with("no"));
    let again = StoredRequest::new(Request::Reset);
    let add = ProgressWrite::AddRequest { projection: "p".into(), request: again.clone() };
    store.write_progress(vec![add]).await.unwrap();
    assert!(missing(store.write_progress(vec![reset(first, "late")]).await));
    let found = listed(Request::Reset, 1).await;
    assert_eq!((found[0].id, &found[0].refused_reason), (again.id, &None));

    let remove = |id| ProgressWrite::RemoveRequest { projection: "p".into(), request: Request::Reset, id };
    assert!(missing(store.write_progress(vec![remove(Some(first))]).await));
    store.write_progress(vec![remove(Some(again.id))]).await.unwrap();
    assert!(missing(store.write_progress(vec![remove(None)]).await));
    assert_eq!(of(&listed(Request::FIRST, 10).await), [order[0], order[1], order[3], order[4]]);
}

/// Checks that the control of a projection is in the store, and so is shared by all nodes.
pub async fn projections_are_paused_triggered_and_resumed(database: Database) {
    let (store, other) = (database.open().await, database.open().await);
    let control = async |change| store.control("p", change).await.unwrap();
    let seen = async || other.controls().await.unwrap().get("p").copied();
    assert_eq!(seen().await, None);
    for _ in 0..2 {
        assert!(control(ControlChange::Pause).await.paused);
        assert!(seen().await.unwrap().paused);
    }
    assert_eq!(control(ControlChange::Announce).await.changes, 1);
    for changes in [2, 3] {
        let resumed = control(ControlChange::Resume).await;
        assert_eq!((resumed.paused, resumed.changes), (false, changes));
    }
    let trigger = |position| ControlChange::Trigger(Position::new(position));
    for (triggers, (position, highest)) in (1..).zip([(5, 5), (3, 5), (8, 8)]) {
        let expected = ProjectionControl {
            paused: false,
            trigger_position: Position::new(highest),
            triggers,
            changes: 3,
        };
        assert_eq!(control(trigger(position)).await, expected);
        assert_eq!(seen().await, Some(expected));
    }
    // Another trigger was made since.
    assert_eq!(control(ControlChange::WithdrawTriggers(2)).await.trigger_position, Position::new(8));
    let withdrawn = control(ControlChange::WithdrawTriggers(3)).await;
    assert_eq!((withdrawn.trigger_position, withdrawn.triggers), (Position::START, 3));
    assert_eq!(other.controls().await.unwrap().len(), 1);
}

/// I7: checks compare and set of the publisher's checkpoint.
pub async fn a_stale_publisher_is_fenced(database: Database) {
    let (store, other) = (database.open().await, database.open().await);
    let at = |position, epoch, sequence| PublisherCheckpoint {
        position: Position::new(position),
        epoch,
        sequence,
    };
    let none = PublisherCheckpoint::default();
    assert_eq!(store.publisher_checkpoint().await.unwrap(), none);
    assert!(!store.save_publisher_checkpoint(at(1, 0, 0), at(2, 0, 0)).await.unwrap());
    assert!(store.save_publisher_checkpoint(none, at(5, 3, 7)).await.unwrap());
    assert_eq!(other.publisher_checkpoint().await.unwrap(), at(5, 3, 7));
    for wrong in [none, at(4, 3, 7), at(5, 2, 7), at(5, 3, 8)] {
        assert!(!other.save_publisher_checkpoint(wrong, at(9, 9, 9)).await.unwrap());
    }
    assert!(!other.save_publisher_checkpoint(at(5, 3, 7), at(6, 2, 8)).await.unwrap());
    assert!(other.save_publisher_checkpoint(at(5, 3, 7), at(5, 4, 7)).await.unwrap());
    assert!(!store.save_publisher_checkpoint(at(5, 3, 7), at(6, 3, 8)).await.unwrap());
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
