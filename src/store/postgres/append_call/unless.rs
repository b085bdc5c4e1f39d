//! A call of one append under a condition.

use std::sync::Arc;

use sqlx::Row;

use super::super::append_failure::{DOING, Failure};
use super::super::connection::Session;
use super::super::convert::{from_sql, to_sql};
use super::super::inner::PgInner;
use super::super::query_arguments::QueryArguments;
use super::many::{bind, decode, events, needs_look_up, numbered};
use super::reply::Reply;
use super::tags::EventTags;
use crate::event::Position;
use crate::store::{Append, AppendError, Boundary};

/// The condition of an append.
#[derive(Debug, Clone, Copy)]
pub(in crate::store::postgres) struct Condition<'a> {
    /// Boundary that no event crosses.
    pub(in crate::store::postgres) boundary: &'a Boundary,
    /// Whether the call waits for tags in use, at most for 50 ms.
    pub(in crate::store::postgres) may_wait: bool,
}

/// Checks that this server process has the events that a boundary rests on.
///
/// Another process that took over may lack them, and give their positions to other events.
pub(super) async fn check_server(core: &Arc<PgInner>, boundary: &Boundary) -> Result<(), Failure> {
    let server = core.numbers.of_server().server;
    if is_checked(core, boundary, server) {
        return Ok(());
    }
    let refresh = core.high_water_mark.refresh(&core.connections, &core.sql);
    core.timed_call(DOING, refresh).await.map_err(|error| match error.is_transient() {
        true => Failure::NotSent(error),
        false => Failure::Failed(error),
    })?;
    if is_checked(core, boundary, server) {
        return Ok(());
    }
    core.numbers.forget(server);
    Err(Failure::OtherServer)
}

fn is_checked(core: &PgInner, boundary: &Boundary, server: i64) -> bool {
    let rests_on_events = boundary.mark() > Position::START || !boundary.seen().is_empty();
    !rests_on_events || core.high_water_mark.is_confirmed_by(server)
}

/// Appends unless an event crosses the boundary. The outcome is `None` if tags are in use.
///
/// Returns nothing if the numbers are those of another server process.
pub(super) async fn execute_unless(
    core: &PgInner,
    session: &mut Session,
    appends: &[&Append],
    condition: Condition<'_>,
) -> Result<Option<Reply>, sqlx::Error> {
    let Some(numbered) = numbered(core, appends) else { return Ok(None) };
    let Condition { boundary, may_wait } = condition;
    if !is_checked(core, boundary, numbered.server) {
        return Ok(None);
    }
    let look_up = needs_look_up(appends);
    let query = bind(sqlx::query(core.sql.append_unless.clone()), core, appends, &numbered, look_up);
    let query = EventTags::of(events(appends)).bind(query);
    let row = QueryArguments::of(boundary.query())
        .bind(query)
        .bind(to_sql(boundary.mark().get()))
        .bind(boundary.seen().iter().map(|position| to_sql(position.get())).collect::<Vec<_>>())
        .bind(may_wait)
        .persistent(core.connections.persistent())
        .fetch_one(&mut **session)
        .await?;
    let crossed = row.try_get::<Option<i64>, _>(6)?;
    let outcome = match crossed.map(|position| Position::new(from_sql(position))) {
        Some(position) => Some(Err(AppendError::crossed(boundary, position))),
        None if row.try_get(7)? => None,
        None => return decode(core, &row, appends, numbered.server),
    };
    let (server, seen) = (numbered.server, Vec::new());
    Ok(Some(Reply { outcomes: vec![outcome], transaction: None, settled: None, server, seen }))
}
