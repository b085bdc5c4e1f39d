//! The suite of all stores, and tests specific to SQLite in `sqlite`.
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
mod sqlite;

#[cfg(feature = "sqlite")]
mod on_sqlite {
    storied::event_store_suite!(super::sqlite::database());
}
