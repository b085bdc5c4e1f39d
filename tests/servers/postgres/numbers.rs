//! Appends after events that the process has seen: without a look-up, and with the same results.

use storied::store::{Append, AppendError};
use storied::{EventStore, ExpectedVersion, PostgresStore, Version};

use crate::postgres::tools::{append, assert_sound, connect, events, exact, stream, whole_log};
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
