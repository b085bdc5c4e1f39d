//! The control of projections and the checkpoint of the publisher, in the event store.

use std::collections::BTreeMap;

use sqlx::SqlStr;

use super::{Session, TypedRow, Value, statements};
use crate::event::Position;
use crate::store::control::{ControlChange, ProjectionControl, PublisherCheckpoint};
use crate::store::error::StoreError;

statements! {
    /// The statements of the control of projections and of the publisher's checkpoint.
    ControlSql {
        controls: "SELECT paused, trigger_position, triggers, changes, projection FROM storied.controls",
        // $6: the number of triggers that a withdrawal knows.
        control: "INSERT INTO storied.controls AS c (projection, paused, trigger_position, triggers, changes)
            VALUES ($1, coalesce($2, false), $3, $4, $5)
            ON CONFLICT (projection) DO UPDATE SET
                paused = coalesce($2, c.paused),
                trigger_position = CASE WHEN c.triggers = $6 THEN 0 WHEN c.trigger_position < $3 THEN $3
                    ELSE c.trigger_position END,
                triggers = c.triggers + $4,
                changes = c.changes + $5
            RETURNING paused, trigger_position, triggers, changes",
        publisher: "SELECT position, epoch, sequence FROM storied.publisher WHERE id = 1",
        create_publisher: "INSERT INTO storied.publisher AS p (id, position, epoch, sequence) VALUES (1, $1, $2, $3)
            ON CONFLICT (id) DO UPDATE SET position = $1, epoch = $2, sequence = $3
            WHERE p.position = $4 AND p.epoch = $5 AND p.sequence = $6",
        update_publisher: "UPDATE storied.publisher SET position = $1, epoch = $2, sequence = $3
            WHERE id = 1 AND position = $4 AND epoch = $5 AND sequence = $6",
    }
}

/// The tables of the control of projections and of the publisher's checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct Controls {
    sql: ControlSql,
    /// Whether statements may be prepared under a name; not with a pooler in transaction mode.
    persistent: bool,
}

impl Controls {
    pub(crate) fn new(text: impl Fn(&str) -> SqlStr, persistent: bool) -> Self {
        Self { sql: ControlSql::new(text), persistent }
    }

    /// Returns what operators control, by projection.
    pub(crate) async fn all<S: Session>(
        &self,
        session: &mut S,
    ) -> Result<BTreeMap<String, ProjectionControl>, StoreError> {
        let rows = session.fetch(&self.sql.controls, self.persistent, &[]).await;
        rows.and_then(|rows| rows.iter().map(|row| Ok((row.text("controls", 4)?, control(row)?))).collect())
            .map_err(|error| S::failed("reading the controls of the projections", error))
    }

    /// Changes what operators control of a projection; returns the result.
    pub(crate) async fn change<S: Session>(
        &self,
        session: &mut S,
        projection: &str,
        change: ControlChange,
    ) -> Result<ProjectionControl, StoreError> {
        let paused = match change {
            ControlChange::Pause => Some(true),
            ControlChange::Resume => Some(false),
            _ => None,
        };
        let withdrawn = match change {
            ControlChange::WithdrawTriggers(triggers) => Some(triggers),
            _ => None,
        };
        let mut first = ProjectionControl::default();
        change.apply(&mut first);
        let values = [
            Value::Text(projection),
            Value::Flag(paused),
            Value::Number(first.trigger_position.get()),
            Value::Number(first.triggers),
            Value::Number(first.changes),
            Value::OptionalNumber(withdrawn),
        ];
        let failed = |error| S::failed(&format!("changing the control of projection {projection}"), error);
        let rows = session.fetch(&self.sql.control, self.persistent, &values).await.map_err(failed)?;
        rows.first().map(control).transpose().map(Option::unwrap_or_default).map_err(failed)
    }

    /// Loads the checkpoint of the publisher.
    pub(crate) async fn publisher<S: Session>(
        &self,
        session: &mut S,
    ) -> Result<PublisherCheckpoint, StoreError> {
        let rows = session.fetch(&self.sql.publisher, self.persistent, &[]).await;
        let found = rows.and_then(|rows| rows.first().map(publisher).transpose());
        found
            .map(Option::unwrap_or_default)
            .map_err(|error| S::failed("reading the checkpoint of the publisher", error))
    }

    /// Moves the checkpoint of the publisher from exactly `from` to `to`; returns whether it moved.
    pub(crate) async fn save_publisher<S: Session>(
        &self,
        session: &mut S,
        from: PublisherCheckpoint,
        to: PublisherCheckpoint,
    ) -> Result<bool, StoreError> {
        if to.epoch < from.epoch {
            return Ok(false);
        }
        let sql = match from == PublisherCheckpoint::default() {
            true => &self.sql.create_publisher,
            false => &self.sql.update_publisher,
        };
        let values = [to, from].map(|of| [of.position.get(), of.epoch, of.sequence].map(Value::Number));
        let moved = session.execute(sql, self.persistent, values.as_flattened()).await;
        moved
            .map(|rows| rows == 1)
            .map_err(|error| S::failed("saving the checkpoint of the publisher", error))
    }
}

fn control(row: &impl TypedRow) -> Result<ProjectionControl, sqlx::Error> {
    const TABLE: &str = "controls";
    Ok(ProjectionControl {
        paused: row.flag(TABLE, 0)?,
        trigger_position: Position::new(row.number(TABLE, 1)?),
        triggers: row.number(TABLE, 2)?,
        changes: row.number(TABLE, 3)?,
    })
}

fn publisher(row: &impl TypedRow) -> Result<PublisherCheckpoint, sqlx::Error> {
    const TABLE: &str = "publisher";
    Ok(PublisherCheckpoint {
        position: Position::new(row.number(TABLE, 0)?),
        epoch: row.number(TABLE, 1)?,
        sequence: row.number(TABLE, 2)?,
    })
}
