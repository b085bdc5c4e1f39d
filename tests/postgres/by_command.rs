//! The index by command: what a look-up costs does not depend on what the statistics say, or on how many have the same id.

use sqlx::{Connection, Row};
use storied::{ExpectedVersion, PostgresOptions};
use uuid::Uuid;

use crate::support::PostgresServer;
use crate::tools::{append, connect, events, run, stream};

/// Statistics that lie: an empty table, a billion rows, one value in each column.
const LIES: [&str; 4] = [
    "UPDATE pg_class SET relpages = 0, reltuples = 0
     WHERE relnamespace = 'storied'::regnamespace AND relname LIKE 'events%'",
    "UPDATE pg_class SET relpages = 1, reltuples = 0
     WHERE relnamespace = 'storied'::regnamespace AND relname LIKE 'events%'",
    "UPDATE pg_class SET relpages = 10000000, reltuples = 1e9
     WHERE relnamespace = 'storied'::regnamespace AND relname LIKE 'events%'",
    "UPDATE pg_statistic SET stadistinct = 1, stanullfrac = 0, stakind1 = 0, stakind2 = 0, stakind3 = 0
     WHERE starelid = 'storied.events'::regclass",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_is_looked_up_by_one_index_whatever_the_statistics_say() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresOptions::new().url(&url).index_by_name(true).connect().await.unwrap();
    let (many, few) = (stream("many"), stream("few"));
    // One id on two streams: 3,000 events on one, two on the other.
    let id = Uuid::new_v4();
    for (stream, count) in [(&many, 3_000), (&few, 2)] {
        let mut commanded = events(count);
        commanded.iter_mut().for_each(|event| event.command_id = id);
        append(&store, stream, ExpectedVersion::Any, commanded).await.unwrap();
        append(&store, stream, ExpectedVersion::Any, events(count)).await.unwrap();
    }
    run(&url, "ANALYZE storied.events").await;
    for lie in LIES {
        run(&url, lie).await;
        let mut connection = connect(&url).await;
        // A plan that was made before sees the lie as well.
        for attempt in 0..2 {
            let mut transaction = connection.begin().await.unwrap();
            let found = sqlx::query(
                "SELECT f.first_version, f.last_version FROM storied.command_events(
                     ARRAY[storied.stream_key('order', 'many'), storied.stream_key('order', 'few'),
                           storied.stream_key('order', 'few')], ARRAY[$1, $1, gen_random_uuid()]) AS f
                 ORDER BY f.n",
            )
            .bind(id)
            .fetch_all(&mut *transaction)
            .await
            .unwrap();
            let found: Vec<(i64, i64)> = found.iter().map(|row| (row.get(0), row.get(1))).collect();
            assert_eq!(found, [(1, 3_000), (1, 2)], "{lie}");
            let used = "SELECT coalesce(string_agg(indexrelname || ' ' || idx_tup_read, ', '), '')
                        FROM pg_stat_xact_user_indexes WHERE relname = 'events' AND idx_scan > 0";
            let used: String = sqlx::query_scalar(used).fetch_one(&mut *transaction).await.unwrap();
            let scans = "SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'events'";
            let scans: i64 = sqlx::query_scalar(scans).fetch_one(&mut *transaction).await.unwrap();
            assert_eq!((used.as_str(), scans), ("events_by_command 4", 0), "{lie}, attempt {attempt}");
            transaction.rollback().await.unwrap();
        }
    }
}
