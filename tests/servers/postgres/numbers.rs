//! Appends after events that the process has seen: without a look-up, and with the same results.

use sqlx::{AssertSqlSafe, Executor};
use storied::store::{Append, AppendError};
use storied::{EventStore, ExpectedVersion, PostgresStore, Version};

use crate::postgres::tools::{
    append, assert_sound, connect, events, eventually, exact, run, stream, whole_log,
};
use crate::support::PostgresServer;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_among_thirty_known_streams_refuses_one_append() {
    let url = PostgresServer::shared().await.create_database().await;
    let (store, other) =
        (PostgresStore::connect(&url).await.unwrap(), PostgresStore::connect(&url).await.unwrap());
    let batch = |expected: ExpectedVersion, count| {
        (0..30).map(|n| Append::one(stream(n), expected, events(count))).collect::<Vec<_>>()
    };
    for answer in store.append(batch(ExpectedVersion::NoStream, 1)).await {
        answer.unwrap();
    }
    append(&other, &stream(7), exact(1), events(2)).await.unwrap();
    for (number, answer) in store.append(batch(exact(1), 2)).await.into_iter().enumerate() {
        match answer {
            Ok(appended) => {
                assert!(number != 7 && appended.versions == [Version::new(3)]);
                assert!(appended.positions.len() == 2 && appended.positions[0] < appended.positions[1]);
            }
            Err(AppendError::Conflict(conflict)) => {
                assert_eq!((number, conflict.actual), (7, Some(Version::new(3))));
            }
            Err(error) => panic!("{error}"),
        }
    }
    // Now every stream is at version 3, and all but one are known.
    for answer in store.append(batch(exact(3), 1)).await {
        assert_eq!(answer.unwrap().versions, [Version::new(4)]);
    }
    let log = whole_log(&store).await;
    assert_sound(&log);
    assert_eq!(log.len(), 30 + 60 + 30);
}

/// Numbers are not in the order of a batch: each append gets the versions and positions of its own
/// events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_to_known_streams_get_their_own_positions() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    // Created one after the other, from the last to the first.
    for number in (0..12).rev() {
        append(&store, &stream(number), ExpectedVersion::NoStream, events(1)).await.unwrap();
    }
    let count = |number: u64| 1 + number as usize % 3;
    let batch = (0..12).map(|number| Append::one(stream(number), exact(1), events(count(number)))).collect();
    for (number, appended) in (0..).zip(store.append(batch).await) {
        let appended = appended.unwrap();
        let recorded = store.read_stream(&stream(number), Version::new(1), 10).await.unwrap();
        let positions: Vec<_> = recorded.iter().map(|event| event.position).collect();
        assert_eq!(appended.positions, positions);
        assert_eq!(appended.versions, [Version::new(1 + count(number) as u64)]);
        assert_eq!(positions.len(), count(number));
    }
    assert_sound(&whole_log(&store).await);
}

/// Two programs append to the same streams, each in its own order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_to_common_streams_do_not_deadlock() {
    let url = PostgresServer::shared().await.create_database().await;
    let writer = async |url: &str, reversed: bool| {
        let store = PostgresStore::connect(url).await.unwrap();
        let (mut last, mut appended) = (vec![Version::NONE; 200], 0);
        while appended < 4_000 {
            let mut numbers: Vec<usize> = (0..last.len()).collect();
            if reversed {
                numbers.reverse();
            }
            let one = |&number: &usize| {
                Append::one(stream(number as u64), ExpectedVersion::Exact(last[number]), events(1))
            };
            let batch = numbers.iter().map(one).collect();
            for (number, answer) in numbers.into_iter().zip(store.append(batch).await) {
                match answer {
                    Ok(new) => (last[number], appended) = (new.versions[0], appended + 1),
                    Err(AppendError::Conflict(conflict)) => last[number] = conflict.actual.unwrap(),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    tokio::join!(writer(&url, false), writer(&url, true));
    assert_sound(&whole_log(&PostgresStore::connect(&url).await.unwrap()).await);
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    let deadlocks: i64 = sqlx::query_scalar(deadlocks).fetch_one(&mut connect(&url).await).await.unwrap();
    assert_eq!(deadlocks, 0);
}

/// The first event of a stream and one after a read need no look-up of the stream.
#[tokio::test]
async fn a_first_event_and_one_after_a_read_need_no_look_up() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::Any, events(2)).await.unwrap();
    run(&url, "ALTER FUNCTION storied.append RENAME TO hidden_append").await;
    let fresh = PostgresStore::connect(&url).await.unwrap();
    append(&fresh, &stream("b"), exact(0), events(1)).await.unwrap();
    append(&fresh, &stream("c"), ExpectedVersion::NoStream, events(1)).await.unwrap();
    assert_eq!(fresh.read_stream(&stream("a"), Version::NONE, 10).await.unwrap().len(), 2);
    append(&fresh, &stream("a"), exact(2), events(2)).await.unwrap();
    append(&fresh, &stream("b"), exact(1), events(1)).await.unwrap();
    // An older page takes nothing back.
    assert_eq!(fresh.read_stream(&stream("a"), Version::NONE, 1).await.unwrap().len(), 1);
    append(&fresh, &stream("a"), exact(4), events(1)).await.unwrap();
    run(&url, "ALTER FUNCTION storied.hidden_append RENAME TO append").await;
    // A stream that exists is a conflict.
    for (id, actual) in [("a", 5), ("b", 2)] {
        match append(&store, &stream(id), ExpectedVersion::NoStream, events(1)).await {
            Err(AppendError::Conflict(conflict)) => assert_eq!(conflict.actual, Some(Version::new(actual))),
            other => panic!("{other:?}"),
        }
    }
    assert_sound(&whole_log(&store).await);
}

/// The owner restores an older log under a running program, on the same server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_seen_in_another_file_is_not_trusted() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(1)).await.unwrap();
    run(&url, "CREATE TABLE dumped AS TABLE storied.events").await;
    append(&store, &stream("a"), exact(1), events(1)).await.unwrap();
    // The sequence is not set back: it does not show the loss.
    run(
        &url,
        "ALTER TABLE storied.events DISABLE TRIGGER USER; TRUNCATE storied.events;
         INSERT INTO storied.events TABLE dumped; ALTER TABLE storied.events ENABLE TRIGGER USER",
    )
    .await;
    match append(&store, &stream("a"), exact(2), events(1)).await {
        Err(AppendError::Conflict(conflict)) => assert_eq!(conflict.actual, Some(Version::new(1))),
        other => panic!("{other:?}"),
    }
    append(&store, &stream("a"), exact(1), events(1)).await.unwrap();
}

/// A copy of the database takes its place on the same server process, with the same files.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_seen_in_the_original_of_a_copy_is_not_trusted() {
    let server = PostgresServer::start().await;
    let url = server.create_database().await;
    let name = url.rsplit('/').next().unwrap();
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("a"), exact(0), events(1)).await.unwrap();
    let as_owner = async |sql: String| {
        // The store opens connections again, which hold up each of these statements.
        let end = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
        eventually("the database is free", async || {
            let mut owner = connect(&server.url()).await;
            owner.execute(AssertSqlSafe(end.clone())).await.unwrap();
            owner.execute(AssertSqlSafe(sql.clone())).await.is_ok()
        })
        .await;
    };
    as_owner(format!("CREATE DATABASE copied TEMPLATE {name}")).await;
    // Connections of before end with a transient error.
    let again = async |version| {
        let mut result = None;
        eventually("an answer", async || {
            let answer = append(&store, &stream("a"), exact(version), events(1)).await;
            let transient = matches!(&answer, Err(AppendError::Store(error)) if error.is_transient());
            result = Some(answer);
            !transient
        })
        .await;
        result.unwrap()
    };
    again(1).await.unwrap();
    as_owner(format!("ALTER DATABASE {name} RENAME TO original")).await;
    as_owner(format!("ALTER DATABASE copied RENAME TO {name}")).await;
    let ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'original'";
    run(&server.url(), ends).await;
    let other = PostgresStore::connect(&url).await.unwrap();
    append(&other, &stream("z"), exact(0), events(20)).await.unwrap();
    match again(2).await {
        Err(AppendError::Conflict(conflict)) => assert_eq!(conflict.actual, Some(Version::new(1))),
        other => panic!("{other:?}"),
    }
}

/// One text for each name and stream, however many events have it; a view shows the log in clear.
#[tokio::test]
async fn a_view_shows_the_log_in_clear() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(2)).await.unwrap();
    append(&store, &stream("a"), exact(2), events(1)).await.unwrap();
    let mut connection = connect(&url).await;
    let shown: Vec<(i64, String, String, i64, String)> = sqlx::query_as(
        "SELECT position, category, stream_id, version, name FROM storied.log ORDER BY position",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    let row = |n: i64| (n, "order".to_owned(), "a".to_owned(), n, "order.placed".to_owned());
    assert_eq!(shown, [row(1), row(2), row(3)]);
    let texts: (i64, i64) =
        sqlx::query_as("SELECT (SELECT count(*) FROM storied.streams), (SELECT count(*) FROM storied.names)")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    assert_eq!(texts, (1, 2));
}
