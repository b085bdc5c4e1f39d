//! The suite of all stores, with exactly the rights that the documents grant.

use storied::PostgresOptions;
use storied::testing::store::Database;

use crate::postgres::rights::granted;
use crate::postgres::tools::as_user;
use crate::support::PostgresServer;

/// Opening the store again acts like a second process on the same database.
async fn postgres() -> Database {
    let url = as_user(&granted(PostgresServer::shared().await).await, "shop");
    Database::new(move || {
        let options = PostgresOptions::new().url(&*url).migrate(false);
        async move { options.connect().await.unwrap() }
    })
}

storied::event_store_suite!(postgres());
