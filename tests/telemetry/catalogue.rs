//! The tables of `docs/observability.md` list exactly the existing metrics.

use std::collections::BTreeMap;

use crate::meters::*;
use crate::{connection, node, subscription, work};

const DOCUMENT: &str = include_str!("../../docs/observability.md");

fn words(cell: &str) -> impl Iterator<Item = String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned)
}

/// Parses the rows of the table of metrics.
fn documented() -> BTreeMap<String, Shape> {
    let rows = DOCUMENT.lines().map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    let rows = rows.filter(|cells| {
        matches!(cells.get(2), Some(&("counter" | "level" | "gauge" | "histogram"))) && cells.len() == 7
    });
    let shape = |cells: Vec<&str>| {
        let name = words(cells[1]).next().unwrap();
        let unit = words(cells[3]).next().unwrap();
        let attributes = words(cells[4]).collect();
        (name.clone(), Shape { name, kind: cells[2].to_owned(), unit, attributes })
    };
    rows.map(shape).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_is_in_the_table_and_every_row_is_a_metric() {
    let _turn = TURN.read().await;
    let meters = Meters::new();
    node::scenario(&meters).await;
    connection::scenario(&meters).await;
    subscription::scenario(&meters).await;
    work::scenario(&meters).await;
    let (seen, documented) = (Shape::of(&meters.seen()), documented());
    let names = |shapes: &BTreeMap<String, Shape>| shapes.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&seen), names(&documented), "left: what was seen, right: the table");
    for (name, shape) in &seen {
        let row = &documented[name];
        assert_eq!((&shape.kind, &shape.unit), (&row.kind, &row.unit), "{name}");
        // Not every error occurs in this test.
        let unsaid: Vec<_> = shape.attributes.difference(&row.attributes).collect();
        assert!(unsaid.is_empty(), "{name} has {unsaid:?}");
        let mut never: Vec<_> = row.attributes.difference(&shape.attributes).collect();
        never.retain(|name| *name != "error.type");
        assert!(never.is_empty(), "{name} never has {never:?}");
    }
}
