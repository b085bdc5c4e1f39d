//! What every store does.

use storied::PostgresStore;
use storied::testing::store::Database;

use crate::support::PostgresServer;

/// Opening it again is what a second process on the same database would do.
async fn postgres() -> Database {
    let url = PostgresServer::shared().await.create_database().await;
    Database::new(move || {
        let url = url.clone();
        async move { PostgresStore::connect(url).await.unwrap() }
    })
}

storied::event_store_suite!(postgres());
