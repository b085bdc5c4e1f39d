//! Every store passes the same suite; what only SQLite can get wrong is below.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use storied::MemoryStore;
use storied::testing::store::Database;

async fn memory() -> Database {
    let store = MemoryStore::new();
    Database::new(move || {
        let store = store.clone();
        async move { store }
    })
}

mod on_memory {
    storied::event_store_suite!(super::memory());
}

#[cfg(feature = "sqlite")]
mod on_sqlite {
    use storied::SqliteStore;
    use storied::testing::store::Database;

    /// Opening it again is what a second process on the same file would do.
    async fn sqlite() -> Database {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events.db");
        Database::new(move || {
            let path = path.clone();
            async move { SqliteStore::open(path).await.unwrap() }
        })
        .keeping(directory)
    }

    storied::event_store_suite!(sqlite());
}
