//! The PostgreSQL store, on real servers: the suite of all stores, and what only PostgreSQL can get wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![cfg(feature = "postgres")]

mod support;

use storied::PostgresStore;
use storied::testing::store::Database;
use support::PostgresServer;

mod conformance {
    use super::*;

    /// Opening it again is what a second process on the same database would do.
    async fn postgres() -> Database {
        let url = PostgresServer::shared().await.create_database().await;
        Database::new(move || {
            let url = url.clone();
            async move { PostgresStore::connect(url).await.unwrap() }
        })
    }

    storied::event_store_suite!(postgres());
}
