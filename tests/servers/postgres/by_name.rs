//! The index by name: it changes no result, and a program that requires it gets it or advice.

use storied::testing::store::{Database, oracle, read};
use storied::{
    EventName, EventStore, ExpectedVersion, Filter, Position, PostgresOptions, PostgresStore, ReadLog,
    StoreError,
};

use crate::postgres::tools::{append, events, run, stream};
use crate::support::PostgresServer;

const INVALIDATE: &str =
    "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'storied.events_by_name'::regclass";

fn indexed(url: &str) -> PostgresOptions {
    PostgresOptions::new().url(url).index_by_name(true)
}

fn refused(opened: Result<PostgresStore, StoreError>, words: &str) {
    match opened {
        Err(error @ StoreError::Incompatible { .. }) => assert!(error.to_string().contains(words), "{error}"),
        other => panic!("{other:?}"),
    }
}

async fn database() -> Database {
    let url = PostgresServer::shared().await.create_database().await;
    Database::new(move || {
        let url = url.clone();
        async move { indexed(&url).connect().await.unwrap() }
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_find_the_same() {
    read::filters_select(database().await).await;
    read::empty_filter_lists_match_nothing(database().await).await;
    read::invalid_filters_are_refused(database().await).await;
    read::long_filter_lists_work(database().await).await;
    read::large_events_come_in_small_pages(database().await).await;
    read::the_scan_skips_other_events(database().await).await;
    read::the_scan_stops_at_its_upper_end(database().await).await;
    read::the_scan_never_passes_the_head(database().await).await;
    oracle::followers_see_exactly_the_log(database().await).await;
}

/// A rare name is not searched for in the log, which would take several pages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn few_among_many_are_looked_up() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = indexed(&url).connect().await.unwrap();
    let mut rare = events(1);
    rare[0].name = EventName::new("order.rare").unwrap();
    let last = append(&store, &stream("a"), ExpectedVersion::Any, rare).await.unwrap().positions[0];
    for _ in 0..12 {
        append(&store, &stream("a"), ExpectedVersion::Any, events(5_000)).await.unwrap();
    }
    let read = ReadLog::after(Position::START)
        .filter(Filter::all().with_names([EventName::new("order.rare").unwrap()]));
    let page = store.read_log(read.clone()).await.unwrap();
    assert_eq!(page.events.len(), 1);
    assert!(!page.has_more(), "one page goes to the end");
    // Also if the end is not that of the log.
    let end = Position::new(page.head.get() - 1);
    let page = store.read_log(ReadLog { after: last, upto: Some(end), ..read }).await.unwrap();
    assert_eq!((page.events.len(), page.scanned_to), (0, end));
}

/// Any number of processes may request the index at the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_create_the_index_concurrently() {
    let url = PostgresServer::shared().await.create_database().await;
    let asking: Vec<_> = (0..8).map(|_| tokio::spawn(indexed(&url).connect())).collect();
    for asked in asking {
        asked.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_login_without_rights_refers_to_the_owner() {
    let url = PostgresServer::shared().await.create_database().await;
    PostgresStore::connect(&url).await.unwrap();
    let verify = || indexed(&url).migrate(false);
    refused(
        verify().connect().await,
        "CREATE INDEX CONCURRENTLY events_by_name ON storied.events (name, position)",
    );
    run(&url, "CREATE INDEX CONCURRENTLY events_by_name ON storied.events (name, position)").await;
    verify().connect().await.unwrap();
}

/// An index whose creation was aborted is not used, and does no harm.
#[tokio::test]
async fn an_invalid_index_is_reported() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = indexed(&url).connect().await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(3)).await.unwrap();
    run(&url, INVALIDATE).await;
    refused(indexed(&url).connect().await, "DROP INDEX storied.events_by_name");
    let store = PostgresStore::connect(&url).await.unwrap();
    let filter = Filter::all().with_names([EventName::new("order.placed").unwrap()]);
    let page = store.read_log(ReadLog::after(Position::START).filter(filter)).await.unwrap();
    assert_eq!(page.events.len(), 3);
    run(&url, "DROP INDEX storied.events_by_name").await;
    indexed(&url).connect().await.unwrap();
}
