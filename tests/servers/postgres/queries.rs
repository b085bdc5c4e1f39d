//! Decisions over tagged events (I13): locks of tags, open transactions, and lost connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::postgres::PgPoolOptions;
use sqlx::{Executor, PgConnection};
use storied::event::Tags;
use storied::store::{Append, AppendError, Appended, Boundary, Query, QueryStore};
use storied::{
    EventStore, ExpectedVersion, NewEvent, Position, PostgresOptions, PostgresStore, RecordedEvent,
    StoreError, Version,
};
use uuid::Uuid;

use crate::postgres::proxy::{Loss, Proxy};
use crate::postgres::tools::{Dice, append, assert_sound, connect, event, exact, run, stream, whole_log};
use crate::support::PostgresServer;

/// Returns an event with tags, each as `key:value`.
fn tagged(tags: &[&str]) -> NewEvent {
    let add = |tags: Tags, tag: &&str| {
        let (key, value) = tag.split_once(':').unwrap();
        tags.tag(key, value)
    };
    NewEvent { tags: tags.iter().fold(Tags::new(), add), ..event() }
}

/// Appends an event with a tag to a new stream, unless the boundary was crossed.
async fn decide(store: &PostgresStore, tag: &str, boundary: Boundary) -> Result<Appended, AppendError> {
    append_unless(store, tagged(&[tag]), boundary).await
}

async fn append_unless(
    store: &PostgresStore,
    event: NewEvent,
    boundary: Boundary,
) -> Result<Appended, AppendError> {
    let append = Append::one(stream(Uuid::now_v7()), ExpectedVersion::NoStream, vec![event]);
    store.append(vec![append.unless(boundary)]).await.remove(0)
}

async fn read(store: &PostgresStore, key: &str, value: impl std::fmt::Display) -> Vec<RecordedEvent> {
    store.read(Query::tagged(key, value)).await.unwrap().0
}

/// Appends an event with a tag in the open transaction of a connection; returns its position.
///
/// The names have numbers already.
async fn append_in(connection: &mut PgConnection, id: &str, tag: &str) -> Position {
    let position: i64 = sqlx::query_scalar(
        "SELECT a.positions[1] FROM storied.number_names(ARRAY['order', 'order.placed']) AS n,
             storied.append_tagged(storied.server(), NULL, ARRAY[NULL::bigint], n.numbers[1:1], ARRAY[$1], ARRAY[0],
                 ARRAY[0::bigint], ARRAY[1], false, n.numbers, n.numbers[2:2], ARRAY[gen_random_uuid()],
                 ARRAY[gen_random_uuid()], ARRAY[''::bytea], ARRAY[''::bytea], false, NULL, ARRAY[1], ARRAY[$2]) AS a",
    )
    .bind(id)
    .bind(tag)
    .fetch_one(connection)
    .await
    .unwrap();
    Position::new(position as u64)
}

#[track_caller]
fn assert_changed(result: Result<Appended, AppendError>, by: Position) {
    match result {
        Err(AppendError::Changed { position }) => assert_eq!(position, by),
        other => panic!("{other:?}"),
    }
}

/// Opens a store in each way: with own connections, with those of a pool, and as through a pooler.
async fn every_way(url: &str) -> [PostgresStore; 3] {
    let pool = PgPoolOptions::new().max_connections(4).connect(url).await.unwrap();
    let options = || PostgresOptions::new().url(url);
    [
        options().connect().await.unwrap(),
        options().pool(pool).connect().await.unwrap(),
        options().transaction_pooler(true).max_connections(1).connect().await.unwrap(),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crossed_boundary_refuses_in_every_way() {
    let url = PostgresServer::shared().await.create_database().await;
    for (way, store) in every_way(&url).await.into_iter().enumerate() {
        let tag = format!("way:{way}");
        let plain = || Append::one(stream(Uuid::now_v7()), ExpectedVersion::Any, vec![tagged(&[&tag])]);
        store.append(vec![plain()]).await.remove(0).unwrap();
        let (seen, boundary) = store.read(Query::tagged("way", way)).await.unwrap();
        assert_eq!(seen.len(), 1);
        // A batch of all kinds: each append has the result of its own.
        let unless = |boundary: &Boundary| plain().unless(boundary.clone());
        let answers = store.append(vec![unless(&boundary), plain(), unless(&boundary)]).await;
        answers[1].as_ref().unwrap();
        let decided = [&answers[0], &answers[2]].into_iter().filter(|answer| answer.is_ok()).count();
        assert!(decided <= 1, "{answers:?}");
        for answer in answers.iter().filter(|answer| answer.is_err()) {
            assert!(matches!(answer, Err(AppendError::Changed { .. })), "{answers:?}");
        }
        let next = read(&store, "way", way).await;
        assert_eq!(next.len(), 2 + decided);
        assert_changed(decide(&store, &tag, boundary).await, next[1].position);

        // A query of another name, and one that no event matches.
        let (_, boundary) = store.read(Query::tagged("way", way).tag("other", 1)).await.unwrap();
        decide(&store, &tag, boundary).await.unwrap();
        let exists = decide(&store, "x:1", Query::tagged("way", way).exists()).await;
        assert!(matches!(exists, Err(AppendError::Exists { position }) if position == next[0].position));
        // An expected version is still checked.
        let boundary = Query::tagged("nothing", way).exists();
        let conflict = Append::one(stream("c"), exact(7), vec![event()]).unless(boundary);
        let conflict = store.append(vec![conflict]).await.remove(0);
        assert!(matches!(conflict, Err(AppendError::Conflict(_))), "{conflict:?}");
    }
}

/// A foreign transaction stays open for 5 s. Its event has a lower position than those that others
/// append meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_transaction_holds_back_only_decisions_on_its_tags() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("a"), exact(0), vec![tagged(&["a:1"])]).await.unwrap();
    let mark = store.high_water_mark().await.unwrap();
    let mut foreign = connect(&url).await;
    foreign.execute("BEGIN").await.unwrap();
    let lower = append_in(&mut foreign, "foreign", "b:1").await;
    // Plain appends do not wait for each other.
    let higher = append(&store, &stream("b"), exact(0), vec![tagged(&["b:1"])]).await.unwrap().positions[0];
    assert!(lower < higher);
    let (seen, boundary) = store.read(Query::tagged("b", 1)).await.unwrap();
    assert_eq!((seen.len(), boundary.mark(), boundary.seen()), (1, mark, &[higher][..]));

    let commit = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(5)).await;
        foreign.execute("COMMIT").await.unwrap();
    });
    let held = tokio::spawn({
        let store = store.clone();
        async move { decide(&store, "b:1", boundary).await }
    });
    for version in 1..=20 {
        let (seen, boundary) = store.read(Query::tagged("a", 1)).await.unwrap();
        assert_eq!(seen.len(), version);
        decide(&store, "a:1", boundary).await.unwrap();
    }
    // The tags of a decision hold back no plain append of the same tags for long.
    let began = Instant::now();
    for version in 1..=5 {
        append(&store, &stream("b"), exact(version), vec![tagged(&["b:1"])]).await.unwrap();
    }
    let took = began.elapsed();
    let now = store.high_water_mark().await.unwrap();
    assert!(!commit.is_finished() && !held.is_finished(), "the machine is too slow");
    assert_eq!(now, mark);
    assert!(took < Duration::from_secs(2), "{took:?}");
    commit.await.unwrap();
    assert_changed(held.await.unwrap(), lower);
    assert_eq!(read(&store, "b", 1).await.len(), 7);
}

/// Events above the mark that the decision has read do not refuse it; any other one does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_above_the_mark_are_told_apart() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("first"), exact(0), vec![tagged(&["a:1"])]).await.unwrap();
    let mut foreign = connect(&url).await;
    foreign.execute("BEGIN").await.unwrap();
    // It holds back the mark, and has another tag.
    append_in(&mut foreign, "foreign", "z:1").await;
    for _ in 0..3 {
        append(&store, &stream(Uuid::now_v7()), exact(0), vec![tagged(&["a:1", "b:1"])]).await.unwrap();
    }
    let query = || Query::any([Query::tagged("b", 1).tag("a", 1), Query::tagged("c", 1)]);
    let (seen, boundary) = store.read(query()).await.unwrap();
    assert_eq!((seen.len(), boundary.seen().len()), (3, 3));
    // It matches no item, as it lacks a tag.
    append(&store, &stream("x"), exact(0), vec![tagged(&["b:1"])]).await.unwrap();
    let decided = decide(&store, "c:1", boundary.clone()).await.unwrap();
    assert_changed(decide(&store, "c:1", boundary).await, decided.positions[0]);
    foreign.execute("ROLLBACK").await.unwrap();
}

/// Decisions wait for a plain append in an open transaction, whichever way the store connects.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decision_waits_for_plain_appends_in_flight() {
    let url = PostgresServer::shared().await.create_database().await;
    for (way, store) in every_way(&url).await.into_iter().enumerate() {
        let tag = format!("way:{way}");
        append(&store, &stream(Uuid::now_v7()), exact(0), vec![tagged(&[&tag])]).await.unwrap();
        for (ending, changes) in [("ROLLBACK", false), ("COMMIT", true)] {
            let (_, boundary) = store.read(Query::tagged("way", way)).await.unwrap();
            let mut plain = connect(&url).await;
            plain.execute("BEGIN").await.unwrap();
            let position = append_in(&mut plain, &Uuid::now_v7().to_string(), &tag).await;
            let deciding = tokio::spawn({
                let (store, tag) = (store.clone(), tag.clone());
                async move { decide(&store, &tag, boundary).await }
            });
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert!(!deciding.is_finished(), "{way}");
            plain.execute(ending).await.unwrap();
            let decided = deciding.await.unwrap();
            if changes {
                assert_changed(decided, position);
            } else {
                decided.unwrap();
            }
        }
    }
}

/// A decision that cannot get its tags gives up, and has written nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decision_gives_up_in_the_end() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("first"), exact(0), vec![tagged(&["a:1"])]).await.unwrap();
    let (_, boundary) = store.read(Query::tagged("a", 1)).await.unwrap();
    let mut plain = connect(&url).await;
    plain.execute("BEGIN").await.unwrap();
    append_in(&mut plain, "plain", "a:1").await;
    let began = Instant::now();
    // Many of them leave connections to others.
    let deciding: Vec<_> = (0..50)
        .map(|_| {
            let (store, boundary) = (store.clone(), boundary.clone());
            tokio::spawn(async move { decide(&store, "a:1", boundary).await })
        })
        .collect();
    let mut slowest = Duration::ZERO;
    while began.elapsed() < Duration::from_secs(8) {
        let one = Instant::now();
        decide(&store, "b:1", Query::tagged("c", 1).exists()).await.unwrap();
        append(&store, &stream(Uuid::now_v7()), exact(0), vec![event()]).await.unwrap();
        slowest = slowest.max(one.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for deciding in deciding {
        let error = deciding.await.unwrap().unwrap_err();
        assert!(matches!(error, AppendError::Store(StoreError::Unavailable { .. })), "{error:?}");
        assert!(error.to_string().contains("tags"), "{error}");
    }
    assert!(began.elapsed() >= Duration::from_secs(9), "{:?}", began.elapsed());
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    plain.execute("ROLLBACK").await.unwrap();
    assert_eq!(read(&store, "a", 1).await.len(), 1);
}

/// The locks of a batch fit into the lock table of the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_may_have_many_tags() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let tags = |n: usize| -> Vec<String> { (0..10).map(|key| format!("t{key}:{n}")).collect() };
    let tagged = |n| tagged(&tags(n).iter().map(String::as_str).collect::<Vec<_>>());
    let batch = (0..512).map(|n| Append::one(stream(n), exact(0), vec![tagged(n)])).collect();
    let answers = store.append(batch).await;
    assert_eq!(answers.len(), 512);
    for (n, answer) in answers.iter().enumerate() {
        let appended = answer.as_ref().unwrap();
        assert_eq!(appended.versions, [Version::new(1)]);
        let key = format!("t{}", n % 10);
        let found = read(&store, &key, n).await;
        assert_eq!(found.iter().map(|event| event.position).collect::<Vec<_>>(), appended.positions);
        assert_eq!(found[0].stream, stream(n));
    }
    let count = "SELECT count(*), count(DISTINCT tag) FROM storied.tags";
    let count: (i64, i64) = sqlx::query_as(count).fetch_one(&mut connect(&url).await).await.unwrap();
    assert_eq!(count, (5_120, 5_120));

    // An append is a transaction, whatever its size. Others of the batch are not affected.
    let large = |count: usize| {
        Append::one(stream(Uuid::now_v7()), exact(0), (1_000..1_000 + count).map(tagged).collect())
    };
    let unless = |append: Append| append.unless(Query::tagged("t0", 999).exists());
    let answers = store.append(vec![large(7), large(6), unless(large(7)), unless(large(6))]).await;
    for (answer, is_valid) in answers.iter().zip([false, true, false, true]) {
        match answer {
            Ok(_) => assert!(is_valid, "{answers:?}"),
            Err(AppendError::Store(StoreError::Invalid { reason })) => {
                assert!(!is_valid && reason.contains("70 (limit 64)"), "{answers:?}");
            }
            Err(_) => panic!("{answers:?}"),
        }
    }
    assert_sound(&whole_log(&store).await);
}

/// Batches and decisions with the same tags in opposite orders.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_of_tags_never_deadlock() {
    let server = PostgresServer::start().await;
    let url = server.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let tags: Vec<String> = (0..12).map(|n| format!("t:{n}")).collect();
    let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    let reversed: Vec<&str> = tags.iter().rev().copied().collect();
    let mut decided = 0;
    for _ in 0..200 {
        let batch = |tags: &[&str]| -> Vec<Append> {
            let one = |tag: &&str| Append::one(stream(Uuid::now_v7()), exact(0), vec![tagged(&[*tag])]);
            tags.iter().map(one).collect()
        };
        let decision = async |tags: &[&str]| {
            let query = Query::any(tags.iter().map(|tag| Query::tagged("t", tag.trim_start_matches("t:"))));
            let (_, boundary) = store.read(query).await.unwrap();
            append_unless(&store, tagged(tags), boundary).await
        };
        let (one, other, first, second) = tokio::join!(
            store.append(batch(&tags)),
            store.append(batch(&reversed)),
            decision(&tags),
            decision(&reversed)
        );
        assert!(one.iter().chain(&other).all(Result::is_ok), "{one:?} {other:?}");
        for decision in [first, second] {
            match decision {
                Ok(_) => decided += 1,
                Err(AppendError::Changed { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
    println!("{decided} of 400 decisions were stored");
    // A deadlock would be repeated, and not seen in the answers.
    assert!(!server.log().contains("deadlock detected"));
    let log = whole_log(&store).await;
    assert_sound(&log);
    assert_eq!(log.len(), 200 * 24 + decided);
}

/// Whatever is lost, a decision has the answer that the log shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_of_a_decision_is_found() {
    let url = PostgresServer::shared().await.create_database().await;
    let proxy = Proxy::start(&url).await;
    for (way, store) in every_way(proxy.url()).await.into_iter().enumerate() {
        append(&store, &stream(Uuid::now_v7()), exact(0), vec![tagged(&["warm:up"])]).await.unwrap();
        for (n, loss) in [Loss::Message, Loss::Answer, Loss::Late].into_iter().enumerate() {
            let (_, boundary) = store.read(Query::tagged("way", way)).await.unwrap();
            let new = tagged(&[&format!("way:{way}")]);
            // Explicit transactions also lose their commits.
            let needle: &[u8] = if way > 0 && n != 2 { b"COMMIT\0" } else { new.id.as_bytes() };
            proxy.lose(needle, loss);
            let id = new.id;
            let appended = append_unless(&store, new, boundary.clone()).await;
            let appended = appended.unwrap_or_else(|error| panic!("{way} {loss:?}: {error}"));
            assert!(proxy.done(), "{way} {loss:?}");
            for _ in 0..2 {
                let found = read(&store, "way", way).await;
                assert_eq!(found.len(), n + 1, "{way} {loss:?}");
                assert_eq!((found[n].id, found[n].position), (id, appended.positions[0]));
            }
            // The decision is made: it cannot be made again.
            assert_changed(decide(&store, &format!("way:{way}"), boundary).await, appended.positions[0]);
        }
    }
    assert_sound(&whole_log(&PostgresStore::connect(&url).await.unwrap()).await);
}

/// Two processes compete for values while their server processes are terminated at any moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminated_decisions_store_at_most_one_event() {
    let url = PostgresServer::shared().await.create_database().await;
    let stores = [PostgresStore::connect(&url).await.unwrap(), PostgresStore::connect(&url).await.unwrap()];
    append(&stores[0], &stream("first"), exact(0), vec![tagged(&["a:1"])]).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let killer = tokio::spawn({
        let (url, done) = (format!("{url}?application_name=killer"), done.clone());
        async move {
            let (mut killer, dice, mut kills) = (connect(&url).await, Dice::random(), 0);
            while !done.load(Ordering::SeqCst) {
                dice.pause(Duration::from_millis(30)).await;
                let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = current_database() AND query LIKE '%append_unless%' AND pid <> pg_backend_pid()";
                kills += sqlx::query(kill).fetch_all(&mut killer).await.unwrap().len();
            }
            kills
        }
    });
    let claim = async |store: &PostgresStore, n: usize| {
        let unique = Query::tagged("user", n).exists();
        decide(store, &format!("user:{n}"), unique).await
    };
    let (mut claimed, mut unknown) = (0, 0);
    let reader = PostgresStore::connect(&format!("{url}?application_name=reader")).await.unwrap();
    for n in 0..150 {
        let answers = tokio::join!(claim(&stores[0], n), claim(&stores[1], n));
        let found = read(&reader, "user", n).await;
        for answer in <[_; 2]>::from(answers) {
            match answer {
                Ok(appended) => {
                    claimed += 1;
                    assert_eq!(found.iter().map(|it| it.position).collect::<Vec<_>>(), appended.positions);
                }
                Err(AppendError::Exists { position }) => assert_eq!(found[0].position, position),
                Err(AppendError::Store(StoreError::OutcomeUnknown { .. })) => unknown += 1,
                Err(AppendError::Store(StoreError::Unavailable { .. })) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert!(found.len() <= 1, "{n}");
        let again = read(&reader, "user", n).await;
        assert_eq!(format!("{again:?}"), format!("{found:?}"));
    }
    done.store(true, Ordering::SeqCst);
    let kills = killer.await.unwrap();
    println!("{kills} kills, {claimed} of 150 claimed, {unknown} outcomes unknown");
    assert!(kills > 0 && claimed > 50, "{kills} {claimed}");
    assert_sound(&whole_log(&reader).await);
}

/// A server that takes over may lack events on which a decision rests, and give their positions to
/// others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decision_on_lost_events_is_refused() {
    let mut server = PostgresServer::start().await;
    let url = server.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("a"), exact(0), vec![tagged(&["a:1"])]).await.unwrap();
    let last = append(&store, &stream("a"), exact(1), vec![tagged(&["a:1"])]).await.unwrap().positions[0];
    let (seen, boundary) = store.read(Query::tagged("a", 1)).await.unwrap();
    assert_eq!((seen.len(), boundary.mark()), (2, last));
    // Another process appends in the place of the last event.
    let lost = format!(
        "ALTER TABLE storied.events DISABLE TRIGGER USER; ALTER TABLE storied.tags DISABLE TRIGGER USER;
         DELETE FROM storied.events WHERE position = {last}; DELETE FROM storied.tags WHERE position = {last};
         ALTER TABLE storied.events ENABLE TRIGGER USER; ALTER TABLE storied.tags ENABLE TRIGGER USER;
         SELECT setval('storied.positions', {last} - 1)"
    );
    run(&url, &lost).await;
    server.stop_immediately().await;
    server.restart().await;
    let other = PostgresStore::connect(&url).await.unwrap();
    let taken = append(&other, &stream("b"), exact(0), vec![tagged(&["a:1"])]).await.unwrap().positions[0];
    assert_eq!(taken, last);
    let began = Instant::now();
    loop {
        match decide(&store, "a:1", boundary.clone()).await {
            Err(AppendError::Store(StoreError::Incompatible { .. })) => break,
            Err(AppendError::Store(error)) if error.is_transient() => {}
            other => panic!("{other:?}"),
        }
        assert!(began.elapsed() < Duration::from_secs(20));
    }
    assert_eq!(read(&other, "a", 1).await.len(), 2);
}
