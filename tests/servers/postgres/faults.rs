//! Crashing and frozen servers, and cut connections: every append gets a true answer, and no event
//! is stored twice.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sqlx::{Connection, Executor};
use storied::store::{Append, AppendError, StreamAppend};
use storied::{
    EventStore, ExpectedVersion, Position, PostgresOptions, PostgresStore, ReadLog, StoreError, Version,
};
use uuid::Uuid;

use crate::postgres::oracle::stress;
use crate::postgres::proxy::{Loss, Proxy};
use crate::postgres::tools::{
    Dice, append, assert_sound, connect, event, events, eventually, exact, run, stream, whole_log,
};
use crate::support::{PgBouncer, PostgresServer};

/// Whatever is lost, the event of each append is in the log once, at the position in the answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_is_found() {
    let url = PostgresServer::shared().await.create_database().await;
    let proxy = Proxy::start(&url).await;
    let store = PostgresStore::connect(proxy.url()).await.unwrap();
    lose_everything(&store, &proxy).await;
}

/// The same with explicit transactions, as with a pooler: there the commit is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_commit_is_found() {
    let server = PostgresServer::shared().await;
    let bouncer = PgBouncer::start(server, 3).await;
    let proxy = Proxy::start(&bouncer.through(&server.create_database().await)).await;
    let options = PostgresOptions::new().url(proxy.url()).transaction_pooler(true);
    let store = options.connect().await.unwrap();
    lose_everything(&store, &proxy).await;

    for loss in [Loss::Message, Loss::Answer, Loss::Late] {
        for expected in [ExpectedVersion::NoStream, ExpectedVersion::Any] {
            let new = event();
            let id = new.id;
            proxy.lose(b"COMMIT\0", loss);
            let to = stream(Uuid::new_v4());
            let appended = append(&store, &to, expected, vec![new]).await.unwrap();
            assert!(proxy.done());
            let found = store.read_stream(&to, Version::NONE, 10).await.unwrap();
            assert_eq!(
                found.iter().map(|event| (event.id, event.position)).collect::<Vec<_>>(),
                [(id, appended.positions[0])]
            );
        }
    }
    assert_sound(&whole_log(&store).await);
}

async fn lose_everything(store: &PostgresStore, proxy: &Proxy) {
    let used = stream("used");
    append(store, &used, ExpectedVersion::NoStream, events(3)).await.unwrap();
    let mut version = 3;
    for losses in [
        vec![Loss::Message],
        vec![Loss::Answer],
        vec![Loss::Late],
        vec![Loss::Message, Loss::Answer],
        vec![Loss::Late, Loss::Message, Loss::Late, Loss::Answer],
    ] {
        for form in 0..3 {
            let expected = [exact(version), ExpectedVersion::Any, ExpectedVersion::StreamExists][form];
            let new = events(2);
            let ids: Vec<_> = new.iter().map(|event| event.id).collect();
            for loss in &losses {
                proxy.lose(ids[1].as_bytes(), *loss);
            }
            let appended = append(store, &used, expected, new)
                .await
                .unwrap_or_else(|error| panic!("{losses:?}: {error}"));
            assert_eq!(appended.versions, [Version::new(version + 2)], "{losses:?}");
            let found = store.read_stream(&used, Version::new(version), 10).await.unwrap();
            assert_eq!(found.iter().map(|event| event.id).collect::<Vec<_>>(), ids, "{losses:?}");
            assert_eq!(found.iter().map(|event| event.position).collect::<Vec<_>>(), appended.positions);
            version += 2;
            // An answer that arrived in time leaves later traps unused: their message is never
            // sent.
            assert!(proxy.done() || losses.len() > 1);
        }
    }

    // A batch with one refused append: whatever is lost, the answers are the same.
    for loss in [Loss::Message, Loss::Answer, Loss::Late] {
        let (a, b) = (stream(Uuid::new_v4()), stream(Uuid::new_v4()));
        let part = |stream: &storied::StreamId| StreamAppend {
            stream: stream.clone(),
            expected: ExpectedVersion::NoStream,
            events: events(2),
        };
        let needle = event();
        let batch = vec![
            Append::all(vec![part(&a), part(&b)]),
            Append::one(used.clone(), ExpectedVersion::NoStream, events(1)),
            Append::one(stream(Uuid::new_v4()), ExpectedVersion::Any, vec![needle.clone()]),
        ];
        proxy.lose(needle.id.as_bytes(), loss);
        let answers = store.append(batch).await;
        assert!(proxy.done());
        assert_eq!(answers[0].as_ref().unwrap().versions, [Version::new(2), Version::new(2)], "{loss:?}");
        match &answers[1] {
            Err(AppendError::Conflict(conflict)) => assert_eq!(conflict.actual, Some(Version::new(version))),
            other => panic!("{loss:?}: {other:?}"),
        }
        assert_eq!(answers[2].as_ref().unwrap().versions, [Version::new(1)], "{loss:?}");
        assert_eq!(store.read_stream(&a, Version::NONE, 10).await.unwrap().len(), 2);
        assert_eq!(store.read_stream(&b, Version::NONE, 10).await.unwrap().len(), 2);
    }
    assert_sound(&whole_log(store).await);
}

/// An append waits for a lock when its connection is lost. Recovery ends its server process:
/// otherwise the process would write as soon as it gets the lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recovery_ends_the_server_process_of_a_lost_append() {
    let url = PostgresServer::shared().await.create_database().await;
    let proxy = Proxy::start(&url).await;
    let store = PostgresStore::connect(proxy.url()).await.unwrap();
    append(&store, &stream(1), exact(0), events(1)).await.unwrap();
    let mut owner = connect(&url).await;
    let mut lock = owner.begin().await.unwrap();
    // Readers are not blocked.
    lock.execute("LOCK TABLE storied.events IN SHARE ROW EXCLUSIVE MODE").await.unwrap();
    let appending = tokio::spawn({
        let store = store.clone();
        async move { append(&store, &stream(1), exact(1), events(1)).await }
    });
    let mut watcher = connect(&url).await;
    let mut waiting = async || -> Vec<i32> {
        sqlx::query_scalar(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
        .fetch_all(&mut watcher)
        .await
        .unwrap()
    };
    let mut first = Vec::new();
    eventually("the append waits", async || {
        first = waiting().await;
        !first.is_empty()
    })
    .await;
    let since = Instant::now();
    proxy.cut_all();
    // Another process replaces it: the append is sent again.
    eventually("the process has ended", async || {
        let now = waiting().await;
        !now.is_empty() && now.iter().all(|pid| !first.contains(pid))
    })
    .await;
    // Long before the server itself ends the statement.
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    lock.rollback().await.unwrap();
    appending.await.unwrap().unwrap();
    let log = whole_log(&store).await;
    assert_sound(&log);
    assert_eq!(log.len(), 2);
}

/// Connections are cut at any moment, while each of four writers has its own stream. No append may
/// be refused, lost or repeated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cuts_at_any_moment_do_no_harm() {
    let url = PostgresServer::shared().await.create_database().await;
    let proxy = Proxy::start(&url).await;
    let store = PostgresStore::connect(proxy.url()).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (store, done) = (store.clone(), done.clone());
            tokio::spawn(async move {
                let mut version = 0;
                while !done.load(Ordering::SeqCst) {
                    let form = [exact(version), ExpectedVersion::Any][(version % 2) as usize];
                    match append(&store, &stream(writer), form, events(1)).await {
                        Ok(appended) => {
                            version += 1;
                            assert_eq!(appended.versions, [Version::new(version)]);
                        }
                        // After too many cuts in a row, the store gives up and reports that nothing
                        // was written.
                        Err(AppendError::Store(StoreError::Unavailable { .. })) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                version
            })
        })
        .collect();
    let dice = Dice::random();
    let end = Instant::now() + Duration::from_secs(4) * stress();
    let mut cuts = 0;
    while Instant::now() < end {
        dice.pause(Duration::from_millis(40)).await;
        proxy.cut_all();
        cuts += 1;
    }
    done.store(true, Ordering::SeqCst);
    let mut versions = 0;
    for writer in writers {
        versions += writer.await.unwrap();
    }
    let log = whole_log(&PostgresStore::connect(url).await.unwrap()).await;
    assert_sound(&log);
    println!("{cuts} cuts, {versions} appends acknowledged, {} in the log", log.len());
    assert_eq!(log.len() as u64, versions);
}

/// The server crashes repeatedly under load. Writers and followers continue with their handles.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashes_lose_nothing() {
    let mut server = PostgresServer::start().await;
    let url = server.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicBool::new(false));
    let unknown = Arc::new(AtomicUsize::new(0));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (store, done, unknown) = (store.clone(), done.clone(), unknown.clone());
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                let dice = Dice::random();
                while !done.load(Ordering::SeqCst) {
                    let new = events(1 + dice.roll(3) as usize);
                    let ids: Vec<_> = new.iter().map(|event| event.id).collect();
                    let to = if dice.roll(2) == 0 { stream(writer) } else { stream("shared") };
                    match append(&store, &to, ExpectedVersion::Any, new).await {
                        Ok(_) => acknowledged.extend(ids),
                        Err(AppendError::Store(StoreError::OutcomeUnknown { reason, .. })) => {
                            println!("unknown: {reason}");
                            unknown.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(AppendError::Store(error)) if error.is_transient() => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                acknowledged
            })
        })
        .collect();
    let followers: Vec<_> = [5, 100]
        .map(|chunk| {
            let (store, written) = (store.clone(), written.clone());
            tokio::spawn(async move {
                let mut seen = Vec::new();
                let mut after = Position::START;
                loop {
                    let finished = written.load(Ordering::SeqCst);
                    match store.read_log(ReadLog::after(after).limit(chunk)).await {
                        Ok(page) => {
                            after = page.scanned_to;
                            seen.extend(page.events.iter().map(|event| (event.position, event.id)));
                            if finished && !page.has_more() && page.events.is_empty() {
                                return seen;
                            }
                        }
                        Err(error) if error.is_transient() => {}
                        Err(error) => panic!("{error}"),
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
        })
        .into_iter()
        .collect();
    let crashes = 4 * stress();
    for _ in 0..crashes {
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        server.stop_immediately().await;
        server.restart().await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    done.store(true, Ordering::SeqCst);
    let mut acknowledged = HashSet::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    written.store(true, Ordering::SeqCst);
    let log = whole_log(&store).await;
    assert_sound(&log);
    let log: Vec<(Position, Uuid)> = log.iter().map(|event| (event.position, event.id)).collect();
    let there: HashSet<Uuid> = log.iter().map(|(_, id)| *id).collect();
    assert_eq!(there, acknowledged, "the log differs from the acknowledged events");
    for follower in followers {
        let seen = follower.await.unwrap();
        assert_eq!(seen, log[..seen.len()], "a phantom, a double or a hole");
        assert_eq!(seen.len(), log.len());
    }
    println!("{crashes} crashes, {} events, {} outcomes unknown", log.len(), unknown.load(Ordering::Relaxed));
    assert_eq!(unknown.load(Ordering::Relaxed), 0);
}

/// A server that does not answer at all: callers get an error in time, and the true answer later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_blocks_no_caller() {
    let mut server = PostgresServer::start().await;
    let url = server.create_database().await;
    let options = PostgresOptions::new()
        .url(&url)
        .statement_timeout(Duration::from_millis(500))
        .acquire_timeout(Duration::from_secs(1));
    let store = options.connect().await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(1)).await.unwrap();
    let a = stream("a");
    server.pause();
    let since = Instant::now();
    let (appended, read) = tokio::join!(
        append(&store, &a, exact(1), events(1)),
        store.read_log(ReadLog::after(Position::START)),
    );
    println!("an append was answered after {:?}", since.elapsed());
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
    match appended.unwrap_err() {
        // The append was sent and may happen after the server continues, or it got no connection.
        AppendError::Store(StoreError::OutcomeUnknown { .. } | StoreError::Unavailable { .. }) => {}
        error => panic!("{error:?}"),
    }
    assert!(read.unwrap_err().is_transient());
    server.resume();
    eventually("the store recovering", async || store.high_water_mark().await.is_ok()).await;
    // The append may still take effect now, as reported; never partially, and never twice.
    append(&store, &stream("a"), ExpectedVersion::Any, events(1)).await.unwrap();
    let log = whole_log(&store).await;
    assert_sound(&log);
    assert!((2..=3).contains(&log.len()), "{}", log.len());
}

/// The transaction that holds back the mark is named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cause_of_a_stall_is_reported() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(2)).await.unwrap();
    let head = store.high_water_mark().await.unwrap();
    assert_eq!(store.stall().await.unwrap(), None);

    let mut culprit = connect(&format!("{url}?application_name=culprit")).await;
    let mut transaction = culprit.begin().await.unwrap();
    transaction
        .execute(
            "SELECT storied.append(storied.server(), null, array[null::bigint], n.numbers[1:1], array['x'], array[0],
                 array[0], array[1], false, n.numbers, n.numbers[2:2], array[gen_random_uuid()],
                 array[gen_random_uuid()], array[''::bytea], array[''::bytea])
             FROM storied.number_names(array['order', 'order.placed']) AS n",
        )
        .await
        .unwrap();
    // Other appends continue; no reader can pass the mark.
    append(&store, &stream("a"), exact(2), events(1)).await.unwrap();
    assert_eq!(store.high_water_mark().await.unwrap(), head);
    let stall = store.stall().await.unwrap().expect("no stalled transaction");
    assert_eq!((stall.application_name.as_str(), stall.state.as_str()), ("culprit", "idle in transaction"));
    assert!(stall.query.contains("storied.append") && stall.pid.is_some(), "{stall:?}");
    assert_eq!(stall.low_water, head);
    transaction.rollback().await.unwrap();
    assert!(store.high_water_mark().await.unwrap() > head);
}

/// Others hold transactions open that have appended, were refused, or are in the middle of a slow commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_do_not_wait_for_each_other() {
    const PATIENCE: Duration = Duration::from_secs(20);
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    // The commit of a transaction that has written to `slow` waits for the lock on `gate`.
    run(
        &url,
        "CREATE TABLE gate (); CREATE TABLE slow ();
         CREATE FUNCTION wait_for_gate() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN LOCK TABLE gate IN SHARE MODE; RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION wait_for_gate()",
    )
    .await;
    run(&url, "SELECT storied.number_names(ARRAY['order', 'order.placed'])").await;
    let mut gate = connect(&url).await;
    gate.execute("BEGIN; LOCK TABLE gate").await.unwrap();
    let begun = async |id: &str, expected: i64| {
        let mut connection = connect(&url).await;
        connection.execute("BEGIN").await.unwrap();
        let append = "SELECT a.positions FROM storied.number_names(array['order', 'order.placed']) AS n,
                 storied.append(storied.server(), null, array[null::bigint], n.numbers[1:1],
                 array[$1], array[0], array[$2], array[1], true, n.numbers, n.numbers[2:2], array[gen_random_uuid()],
                 array[gen_random_uuid()], array[''::bytea], array[''::bytea]) AS a";
        let append = sqlx::query_scalar(append).bind(id).bind(expected);
        let drawn: Option<Vec<i64>> = append.fetch_one(&mut connection).await.unwrap();
        (connection, drawn.is_some())
    };
    let (mut slow, _) = begun("slow", 0).await;
    slow.execute("INSERT INTO slow DEFAULT VALUES").await.unwrap();
    let commit = tokio::spawn(async move { slow.execute("COMMIT").await.map(drop) });
    let mut watcher = connect(&url).await;
    eventually("the commit waits", async || {
        let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'gate'::regclass)";
        sqlx::query_scalar(waits).fetch_one(&mut watcher).await.unwrap()
    })
    .await;
    let (mut open, appended) = begun("open", 0).await;
    // It draws no position: the next one takes its lock with the same key.
    let (mut refused, drew) = begun("refused", 7).await;
    assert_eq!((appended, drew), (true, false));

    let steps = [
        ("one", ExpectedVersion::NoStream, 1),
        ("one", exact(1), 1),
        ("several", ExpectedVersion::NoStream, 3),
        ("several", ExpectedVersion::Any, 1),
    ];
    for (id, expected, count) in steps {
        let to = stream(id);
        let append = append(&store, &to, expected, events(count));
        let appended = tokio::time::timeout(PATIENCE, append).await;
        appended.unwrap_or_else(|_| panic!("{count} events to {id} wait for another writer")).unwrap();
    }
    assert!(!commit.is_finished());
    gate.execute("COMMIT").await.unwrap();
    commit.await.unwrap().unwrap();
    open.execute("COMMIT").await.unwrap();
    refused.execute("COMMIT").await.unwrap();
    let log = whole_log(&store).await;
    assert_sound(&log);
    assert_eq!(log.len(), 8);
}
