//! The import of docs/migration.md, from a table in the format of goes.

#[path = "../../examples/import_goes.rs"]
#[allow(dead_code, reason = "a separate program")]
mod import_goes;

use crate::support::PostgresServer;
use import_goes::{OrderEvent, import};
use sqlx::{Executor, PgPool};
use storied::{EventStore, Position, PostgresStore, ReadLog, RecordedEvent};
use uuid::Uuid;

const TABLE: &str = "CREATE TABLE events (
    id UUID PRIMARY KEY NOT NULL, name VARCHAR(255) NOT NULL, time BIGINT NOT NULL,
    aggregate_id UUID, aggregate_name VARCHAR(255), aggregate_version INTEGER, data JSONB)";

/// Inserts an event of the old log: its aggregate, old version, time and content.
async fn old(from: &PgPool, aggregate: u128, version: i32, time: i64, name: &str, data: &str) -> Uuid {
    let id = Uuid::now_v7();
    sqlx::query("INSERT INTO events VALUES ($1, $2, $3, $4, 'shop.order', $5, $6::jsonb)")
        .bind(id)
        .bind(name)
        .bind(time)
        .bind(Uuid::from_u128(aggregate))
        .bind(version)
        .bind(data)
        .execute(from)
        .await
        .unwrap();
    id
}

async fn log(store: &PostgresStore) -> Vec<RecordedEvent> {
    store.read_log(ReadLog::after(Position::START)).await.unwrap().events
}

#[tokio::test]
async fn a_log_is_imported_in_order_with_its_ids_and_times_and_once() {
    let server = PostgresServer::shared().await;
    let from = PgPool::connect(&server.create_database().await).await.unwrap();
    let to = PostgresStore::connect(&server.create_database().await).await.unwrap();
    from.execute(TABLE).await.unwrap();
    let placed = format!(r#"{{"Customer": "{}", "Total": 1299}}"#, Uuid::from_u128(7));
    // The clock of the second aggregate went back, and its versions have a gap: both occur in old
    // logs.
    let first = old(&from, 1, 1, 1_000_000_000_000_000_001, "shop.order.placed", &placed).await;
    let second = old(&from, 2, 1, 1_000_000_000_000_000_005, "shop.order.placed", &placed).await;
    let third = old(&from, 2, 3, 1_000_000_000_000_000_003, "shop.order.cancelled", r#""too late""#).await;
    let fourth = old(&from, 1, 2, 1_000_000_000_000_000_009, "shop.order.cancelled", r#""never""#).await;

    assert_eq!(import(&from, &to).await.unwrap(), 4);
    let events = log(&to).await;
    assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), [first, second, third, fourth]);
    assert_eq!(events.iter().map(|event| event.version.get()).collect::<Vec<_>>(), [1, 1, 2, 2]);
    let expected = OrderEvent::Placed { customer: Uuid::from_u128(7), pence: 1_299 };
    assert_eq!(events[0].decode::<OrderEvent>().unwrap(), expected);
    assert_eq!(
        events[2].decode::<OrderEvent>().unwrap(),
        OrderEvent::Cancelled { reason: "too late".into() }
    );
    let metadata = events[2].decode_metadata().unwrap();
    assert_eq!(metadata.user["occurred_at"], "2001-09-09T01:46:40.000000003+00:00");

    // Imports again, after the old service has continued.
    old(&from, 3, 1, 1_000_000_000_000_000_011, "shop.order.placed", &placed).await;
    assert_eq!(import(&from, &to).await.unwrap(), 1);
    assert_eq!(import(&from, &to).await.unwrap(), 0);
    assert_eq!(log(&to).await.len(), 5);

    // An untranslated event stops the import, and so does a foreign stream.
    old(&from, 4, 1, 1_000_000_000_000_000_012, "shop.order.lost", "null").await;
    assert!(import(&from, &to).await.unwrap_err().to_string().contains("shop.order.lost"));
    from.execute(
        "UPDATE events SET id = gen_random_uuid() WHERE name = 'shop.order.lost' OR aggregate_version = 3",
    )
    .await
    .unwrap();
    from.execute("DELETE FROM events WHERE name = 'shop.order.lost'").await.unwrap();
    assert!(import(&from, &to).await.unwrap_err().to_string().contains("conflict"));
}
