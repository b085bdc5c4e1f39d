//! The suite of all stores, and tests specific to SQLite in `sqlite`.

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

mod sqlite;

mod on_sqlite {
    storied::event_store_suite!(super::sqlite::database());
}
