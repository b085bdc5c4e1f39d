//! The program of docs/guide.md, run alone and on several nodes with real servers.

#[path = "../../examples/guide.rs"]
#[allow(dead_code, clippy::module_inception, reason = "a separate program")]
mod guide;

use std::time::Duration;

use crate::support::{NatsOptions, NatsServer, PostgresServer};
use guide::{Show, ShowCommand, ShowError, ShowEvent};
use sqlx::PgPool;
use storied::testing::given;

#[test]
fn a_show_sells_what_it_has() {
    let announced = || ShowEvent::Announced { title: "Hamlet".into(), seats: 3 };
    let sell = |seats| ShowCommand::Sell { buyer: "Ada".into(), seats };
    let sold = |seats| ShowEvent::Sold { buyer: "Ada".into(), seats };

    given::<Show>([]).when(sell(1)).then_error(ShowError::Unknown);
    given::<Show>([announced()]).when(sell(2)).then([sold(2)]);
    given::<Show>([announced(), sold(2)]).when(sell(1)).then([sold(1), ShowEvent::SoldOut]);
    given::<Show>([announced(), sold(2)]).when(sell(2)).then_error(ShowError::TooFew { left: 1 });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_process_keeps_the_log_and_builds_a_read_model_from_its_start() {
    let directory = tempfile::tempdir().unwrap();
    guide::commands(directory.path()).await.unwrap();
    guide::projections(directory.path()).await.unwrap();
    guide::processes(directory.path()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_share_the_shows_and_may_stop_at_any_time() {
    let postgres = PostgresServer::shared().await;
    let database = postgres.create_database().await;
    let nats = NatsServer::start(NatsOptions::core()).await;
    guide::migrate(&database).await.unwrap();
    let first = guide::node(&database, &nats.url()).await.unwrap();
    let second = guide::node(&database, &nats.url()).await.unwrap();
    let office = guide::box_office(&database, &nats.url()).await.unwrap();

    let announce = ShowCommand::Announce { title: "Macbeth".into(), seats: 50 };
    office.execute::<Show>("macbeth", announce).await.unwrap();
    assert_eq!(guide::sell(&office, "macbeth", 10).await.unwrap(), 10);
    // One of the nodes stops while the other sells; each may own the show.
    let (sold, ended) = tokio::join!(guide::sell(&office, "macbeth", 45), first.shutdown());
    ended.unwrap();
    assert_eq!(sold.unwrap(), 40);

    let head = office.status().await.high_water_mark.unwrap();
    let sales = second.projection("sales").unwrap();
    sales.caught_up_to_within(head, Duration::from_secs(30)).await.unwrap();
    let read = PgPool::connect(&database).await.unwrap();
    let sold: i64 =
        sqlx::query_scalar("SELECT sum(seats)::bigint FROM sales").fetch_one(&read).await.unwrap();
    assert_eq!(sold, 50);
    assert_eq!(guide::trouble(&second).await, Vec::<String>::new());
    office.shutdown().await.unwrap();
    second.shutdown().await.unwrap();
}
