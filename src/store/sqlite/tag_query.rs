//! SQL that finds the events of a query by their tags.
//!
//! The text depends only on the form of the query, so the statements of a program stay prepared.

use sqlx::Arguments;
use sqlx::error::BoxDynError;
use sqlx::sqlite::SqliteArguments;

use super::super::{Boundary, Query, QueryItem};
use super::convert::{json_list, to_sql};
use crate::event::{EventName, Position, Tag};

/// Adds a query of the positions of the first `limit` events after `after`, in their order.
pub(super) fn add_page(
    sql: &mut String,
    arguments: &mut SqliteArguments,
    query: &Query,
    after: Position,
    limit: usize,
) -> Result<(), BoxDynError> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut separator = "";
    for item in query.items() {
        *sql += separator;
        add_item(sql, arguments, item, after, None, limit)?;
        separator = "\n    UNION";
    }
    *sql += "\n    ORDER BY position LIMIT ?";
    arguments.add(limit)
}

/// Adds a query of one row: the first event that crosses a boundary, or NULL, and the end of the
/// log.
pub(super) fn add_crossing(
    sql: &mut String,
    arguments: &mut SqliteArguments,
    boundary: &Boundary,
) -> Result<(), BoxDynError> {
    *sql += "
    SELECT min(position), (SELECT coalesce(max(position), 0) FROM storied_events) FROM (";
    let mut separator = "";
    for item in boundary.query().items() {
        *sql += separator;
        add_item(sql, arguments, item, boundary.mark(), Some(boundary.seen()), 1)?;
        separator = "\n    UNION ALL";
    }
    *sql += ");\n";
    Ok(())
}

/// Adds a query of the positions of an item's first `limit` events after `after`, without `known`.
///
/// It reads the events of the smallest tag, and looks up each other tag of such an event.
fn add_item(
    sql: &mut String,
    arguments: &mut SqliteArguments,
    item: &QueryItem,
    after: Position,
    known: Option<&[Position]>,
    limit: i64,
) -> Result<(), BoxDynError> {
    *sql += "
    SELECT position FROM (
        SELECT tagged.position FROM storied_tags AS tagged WHERE tagged.tag = ? AND tagged.position > ?";
    let mut tags = item.tags().iter();
    arguments.add(tags.next().map(Tag::as_str))?;
    arguments.add(to_sql(after.get()))?;
    for tag in tags {
        *sql += "
            AND EXISTS (
                SELECT 1 FROM storied_tags AS other
                WHERE other.tag = ? AND other.position = tagged.position)";
        arguments.add(tag.as_str())?;
    }
    if let Some(names) = item.names() {
        *sql += "
            AND tagged.name IN (
                SELECT number FROM storied_names WHERE name IN (SELECT value FROM json_each(?)))";
        arguments.add(json_list(names.iter().map(EventName::as_str)))?;
    }
    if let Some(known) = known {
        *sql += "
            AND tagged.position NOT IN (SELECT value FROM json_each(?))";
        let known = known.iter().map(|position| to_sql(position.get()));
        arguments.add(serde_json::Value::from_iter(known).to_string())?;
    }
    *sql += "
        ORDER BY tagged.position LIMIT ?)";
    arguments.add(limit)
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};
    use sqlx::sqlite::SqliteConnection;
    use sqlx::{AssertSqlSafe, Connection, Row};

    use super::*;
    use crate::event::Event;

    #[derive(Serialize, Deserialize)]
    enum SeatEvent {
        Taken,
    }

    impl Event for SeatEvent {
        const CATEGORY: &'static str = "seat";
    }

    /// Returns the steps of a statement's plan that read tags or events.
    async fn plan(connection: &mut SqliteConnection, statement: &str) -> Vec<String> {
        let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
        let steps = sqlx::query(explain).fetch_all(connection).await.unwrap();
        let steps = steps.iter().map(|step| step.get::<String, _>(3));
        let tables = ["tagged", "other", "storied_tags", "storied_events"];
        steps.filter(|step| step.split(' ').any(|word| tables.contains(&word))).collect()
    }

    #[tokio::test]
    async fn each_item_reads_only_the_events_of_one_tag() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        sqlx::raw_sql(include_str!("../../../migrations/sqlite/0001_events.sql"))
            .execute(&mut connection)
            .await
            .unwrap();
        let one = Query::tagged("a", 1);
        let three = Query::variants::<SeatEvent>(["Taken"]).tag("a", 1).tag("b", 2).tag("c", 3);
        three.check().unwrap();
        for (query, others) in [(one.clone(), 0), (three.clone(), 2), (Query::any([three, one]), 2)] {
            let items = query.items().len();
            let (mut page, mut arguments) = (String::new(), SqliteArguments::default());
            add_page(&mut page, &mut arguments, &query, Position::new(7), 9).unwrap();
            assert_eq!(arguments.len(), page.matches('?').count());
            let (mut crossing, mut arguments) = (String::new(), SqliteArguments::default());
            add_crossing(&mut crossing, &mut arguments, &query.exists()).unwrap();
            assert_eq!(arguments.len(), crossing.matches('?').count());
            for statement in [page, crossing] {
                let plan = plan(&mut connection, &statement).await;
                let found = |by: &str| plan.iter().filter(|step| step.ends_with(by)).count();
                assert_eq!(found("USING PRIMARY KEY (tag=? AND position>?)"), items, "{plan:#?}");
                assert_eq!(found("USING PRIMARY KEY (tag=? AND position=?)"), others, "{plan:#?}");
                // The end of the log is one step, too.
                let is_search = |step: &String| {
                    step.contains("PRIMARY KEY (tag=? AND position") || step == "SEARCH storied_events"
                };
                assert!(plan.iter().all(is_search), "{plan:#?}");
            }
        }
    }
}
