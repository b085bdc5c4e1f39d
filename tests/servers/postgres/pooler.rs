//! PgBouncer in transaction mode, with fewer connections to the server than clients: every
//! transaction may use another session.

use storied::testing::store::Database;
use storied::{EventStore, ExpectedVersion, PostgresOptions, PostgresStore, StoreError};
use tokio::sync::OnceCell;

use crate::postgres::tools::{append, assert_sound, events, stream, whole_log};
use crate::support::{PgBouncer, PostgresServer};

async fn bouncer() -> &'static PgBouncer {
    static SHARED: OnceCell<PgBouncer> = OnceCell::const_new();
    SHARED.get_or_init(async || PgBouncer::start(PostgresServer::shared().await, 3).await).await
}

async fn pooled() -> Database {
    let url = bouncer().await.through(&PostgresServer::shared().await.create_database().await);
    Database::new(move || {
        let options = PostgresOptions::new().url(&*url).transaction_pooler(true);
        async move { options.connect().await.unwrap() }
    })
}

storied::event_store_suite!(pooled());

/// Eight processes migrate and then append concurrently, through three sessions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_share_few_sessions() {
    let url = bouncer().await.through(&PostgresServer::shared().await.create_database().await);
    let clients: Vec<_> = (0..8)
        .map(|client| {
            let options = PostgresOptions::new().url(&*url).transaction_pooler(true);
            tokio::spawn(async move {
                let store = options.connect().await.unwrap();
                for _ in 0..20 {
                    append(&store, &stream(client % 3), ExpectedVersion::Any, events(2)).await.unwrap();
                    store.high_water_mark().await.unwrap();
                }
                store
            })
        })
        .collect();
    let mut last = None;
    for client in clients {
        last = Some(client.await.unwrap());
    }
    let log = whole_log(&last.unwrap()).await;
    assert_sound(&log);
    assert_eq!(log.len(), 8 * 20 * 2);
}

/// Without the option, the error names the pooler option.
#[tokio::test]
async fn a_pooler_is_noticed() {
    let url = bouncer().await.through(&PostgresServer::shared().await.create_database().await);
    let error = PostgresStore::connect(url).await.unwrap_err();
    assert!(matches!(error, StoreError::Misconfigured { .. }), "{error:?}");
    assert!(error.to_string().contains("PostgresOptions::transaction_pooler"), "{error}");
}
