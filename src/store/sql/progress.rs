//! The progress of projections, over a connection.
//!
//! A projection stores it in the database of its read model, in the read model's transaction. The
//! event store uses the same functions on its own schema.

use std::ops::RangeInclusive;

use sqlx::SqlStr;
use uuid::Uuid;

use super::rows::{checkpoint, parked_event, projection, stored_request};
use super::{Session, TypedRow, Value, statements};
use crate::event::Position;
use crate::store::error::StoreError;
use crate::store::progress::{
    Checkpoint, CheckpointError, CheckpointKey, CheckpointRecord, ParkedEvent, ProgressWrite, StoredProgress,
    StoredProjection,
};
use crate::store::request::{Request, StoredRequest};

statements! {
    /// The statements of the progress of projections, in whichever schema it is.
    ProgressSql {
        adopt_projection: "UPDATE storied.projections SET store_id = $2 WHERE name = $1 AND store_id <> $2",
        adopt_checkpoints: "UPDATE storied.checkpoints SET store_id = $2 WHERE projection = $1 AND store_id <> $2",
        projection: "SELECT name, partitions, live_version, building_version, start_position, revision, store_id
            FROM storied.projections WHERE name = $1",
        projections: "SELECT name, partitions, live_version, building_version, start_position, revision, store_id
            FROM storied.projections ORDER BY name",
        create_projection: "INSERT INTO storied.projections
                (name, store_id, partitions, live_version, building_version, start_position, revision)
            VALUES ($1, $2, $3, $4, $5, $6, $7 + 1) ON CONFLICT DO NOTHING",
        update_projection: "UPDATE storied.projections
            SET partitions = $3, live_version = $4, building_version = $5, start_position = $6, revision = $7 + 1
            WHERE name = $1 AND store_id = $2 AND revision = $7",
        checkpoint: "SELECT projection, version, partition, position, epoch, generation, delivered, store_id
            FROM storied.checkpoints WHERE projection = $1 AND version = $2 AND partition = $3",
        checkpoints: "SELECT projection, version, partition, position, epoch, generation, delivered, store_id
            FROM storied.checkpoints WHERE projection = $1 ORDER BY version, partition",
        records: "SELECT c.projection, c.version, c.partition, c.position, c.epoch, c.generation, c.delivered, c.store_id,
                c.updated_at, (SELECT count(*) FROM storied.parked AS p
                    WHERE p.projection = c.projection AND p.version = c.version AND p.partition = c.partition)
            FROM storied.checkpoints AS c ORDER BY c.projection, c.version, c.partition",
        // A checkpoint that was never saved is the default one, so only from there a row is created.
        create_checkpoint: "INSERT INTO storied.checkpoints AS c
                (projection, version, partition, store_id, position, epoch, generation, delivered, updated_at)
            SELECT $1, $2, $3, $4, $5, $6, $7, $8, {now} WHERE {begun}
            ON CONFLICT (projection, version, partition) DO UPDATE
            SET position = $5, epoch = $6, generation = $7, delivered = $8, updated_at = {now}
            WHERE c.store_id = $4 AND c.position = $9 AND c.epoch = $10 AND c.generation = $11",
        update_checkpoint: "UPDATE storied.checkpoints
            SET position = $5, epoch = $6, generation = $7, delivered = $8, updated_at = {now}
            WHERE projection = $1 AND version = $2 AND partition = $3 AND store_id = $4
                AND position = $9 AND epoch = $10 AND generation = $11 AND {begun}",
        park: "INSERT INTO storied.parked (projection, version, partition, position, event_id, category, stream_id,
                stream_version, event_name, error, attempts, parked_at)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
            ON CONFLICT (projection, version, partition, position) DO UPDATE
            SET event_id = excluded.event_id, category = excluded.category, stream_id = excluded.stream_id,
                stream_version = excluded.stream_version, event_name = excluded.event_name, error = excluded.error,
                attempts = excluded.attempts, parked_at = excluded.parked_at",
        parked: "SELECT position, event_id, category, stream_id, stream_version, event_name, error, attempts, parked_at
            FROM storied.parked WHERE projection = $1 AND version = $2 AND partition = $3 AND position >= $4
            ORDER BY position LIMIT $5",
        unpark: "DELETE FROM storied.parked
            WHERE projection = $1 AND version = $2 AND partition = $3 AND position >= $4 AND position <= $5",
        requests: "SELECT kind, position, id, requested_at, refused_reason FROM storied.requests
            WHERE projection = $1 AND (kind, position) >= ($2, $3) ORDER BY kind, position LIMIT $4",
        add_request: "INSERT INTO storied.requests (projection, kind, position, id, requested_at, refused_reason)
            VALUES ($1, $2, $3, $4, $5, $6)
            ON CONFLICT (projection, kind, position) DO UPDATE
            SET id = excluded.id, requested_at = excluded.requested_at, refused_reason = excluded.refused_reason",
        remove_request: "DELETE FROM storied.requests
            WHERE projection = $1 AND kind = $2 AND position = $3 AND id = coalesce($4, id)",
        refuse_request: "UPDATE storied.requests SET refused_reason = $5
            WHERE projection = $1 AND kind = $2 AND position = $3 AND id = $4",
    }
}

/// The tables with the progress of projections.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    sql: ProgressSql,
    /// Whether statements may be prepared under a name; not with a pooler in transaction mode.
    persistent: bool,
}

impl Progress {
    /// Uses the tables to which `text` leads.
    ///
    /// `now` is the expression of the time. `begun` is a condition for every move of a checkpoint.
    pub(crate) fn new(text: impl Fn(&str) -> SqlStr, now: &str, begun: &str, persistent: bool) -> Self {
        let text = |sql: &str| text(&sql.replace("{now}", now).replace("{begun}", begun));
        Self { sql: ProgressSql::new(text), persistent }
    }

    async fn fetch<S: Session>(
        &self,
        session: &mut S,
        sql: &SqlStr,
        values: &[Value<'_>],
        doing: &str,
    ) -> Result<Vec<S::Row>, StoreError> {
        let rows = session.fetch(sql, self.persistent, values).await;
        rows.map_err(|error| S::failed(doing, error))
    }

    async fn execute<S: Session>(
        &self,
        session: &mut S,
        sql: &SqlStr,
        values: &[Value<'_>],
        doing: &str,
    ) -> Result<u64, StoreError> {
        let done = session.execute(sql, self.persistent, values).await;
        done.map_err(|error| S::failed(doing, error))
    }

    /// Loads the layout, the versions and the start position of a projection, of `store` or any.
    ///
    /// # Errors
    /// `Incompatible` if they belong to another store than `store`.
    pub(crate) async fn projection<S: Session>(
        &self,
        session: &mut S,
        name: &str,
        store: Option<Uuid>,
    ) -> Result<StoredProjection, StoreError> {
        let doing = format!("reading the versions of projection {name}");
        let rows = self.fetch(session, &self.sql.projection, &[Value::Text(name)], &doing).await?;
        let Some(row) = rows.first() else { return Ok(StoredProjection::default()) };
        let (name, found, of) = projection(row).map_err(|error| S::failed(&doing, error))?;
        same_store(&format!("projection {name}"), of, store.unwrap_or(of))?;
        Ok(found)
    }

    /// Loads a checkpoint in the log of `store`; the default one if none was saved.
    ///
    /// # Errors
    /// `Incompatible` if the checkpoint belongs to another store.
    pub(crate) async fn checkpoint<S: Session>(
        &self,
        session: &mut S,
        key: &CheckpointKey,
        store: Uuid,
    ) -> Result<Checkpoint, StoreError> {
        let doing = format!("reading the checkpoint of {key}");
        let rows = self.fetch(session, &self.sql.checkpoint, &of(key), &doing).await?;
        let Some(row) = rows.first() else { return Ok(Checkpoint::default()) };
        let (_, found, of) = checkpoint(row).map_err(|error| S::failed(&doing, error))?;
        same_store(&key.to_string(), of, store)?;
        Ok(found)
    }

    /// Loads all checkpoints of a projection in the log of `store`.
    ///
    /// # Errors
    /// `Incompatible` if a checkpoint belongs to another store.
    pub(crate) async fn checkpoints<S: Session>(
        &self,
        session: &mut S,
        name: &str,
        store: Uuid,
    ) -> Result<Vec<(CheckpointKey, Checkpoint)>, StoreError> {
        let doing = format!("reading the checkpoints of projection {name}");
        let rows = self.fetch(session, &self.sql.checkpoints, &[Value::Text(name)], &doing).await?;
        let mut found = Vec::with_capacity(rows.len());
        for row in &rows {
            let (key, checkpoint, of) = checkpoint(row).map_err(|error| S::failed(&doing, error))?;
            same_store(&key.to_string(), of, store)?;
            found.push((key, checkpoint));
        }
        Ok(found)
    }

    /// Makes the progress of a projection one in the log of `store`, and loads it.
    pub(crate) async fn adopt<S: Session>(
        &self,
        session: &mut S,
        name: &str,
        store: Uuid,
    ) -> Result<StoredProgress, StoreError> {
        let doing = format!("taking over the checkpoints of projection {name}");
        let values = [Value::Text(name), Value::Id(Some(store))];
        self.execute(session, &self.sql.adopt_projection, &values, &doing).await?;
        self.execute(session, &self.sql.adopt_checkpoints, &values, &doing).await?;
        let projection = self.projection(session, name, Some(store)).await?;
        Ok(StoredProgress { projection, checkpoints: self.checkpoints(session, name, store).await? })
    }

    /// Loads all projections, ordered by name, each with the id of its store.
    pub(crate) async fn projections<S: Session>(
        &self,
        session: &mut S,
    ) -> Result<Vec<(String, StoredProjection)>, StoreError> {
        const DOING: &str = "reading the projections";
        let rows = self.fetch(session, &self.sql.projections, &[], DOING).await?;
        let found = rows.iter().map(|row| projection(row).map(|(name, found, _)| (name, found)));
        found.collect::<Result<_, _>>().map_err(|error| S::failed(DOING, error))
    }

    /// Loads all checkpoints, ordered by key.
    pub(crate) async fn records<S: Session>(
        &self,
        session: &mut S,
    ) -> Result<Vec<CheckpointRecord>, StoreError> {
        const DOING: &str = "reading the checkpoints";
        let record = |row: &S::Row| -> Result<_, sqlx::Error> {
            let (key, checkpoint, store) = checkpoint(row)?;
            let (updated_at, parked) = (row.time("checkpoints", 8)?, row.number("checkpoints", 9)?);
            Ok(CheckpointRecord { key, checkpoint, store, updated_at, parked })
        };
        let rows = self.fetch(session, &self.sql.records, &[], DOING).await?;
        rows.iter().map(record).collect::<Result<_, _>>().map_err(|error| S::failed(DOING, error))
    }

    /// Returns parked events from a position on, oldest first.
    pub(crate) async fn parked<S: Session>(
        &self,
        session: &mut S,
        key: &CheckpointKey,
        from: Position,
        limit: usize,
    ) -> Result<Vec<ParkedEvent>, StoreError> {
        let doing = format!("reading the parked events of {key}");
        let [name, version, partition] = of(key);
        let values = [name, version, partition, Value::Number(from.get()), Value::Number(limit as u64)];
        let rows = self.fetch(session, &self.sql.parked, &values, &doing).await?;
        rows.iter().map(parked_event).collect::<Result<_, _>>().map_err(|error| S::failed(&doing, error))
    }

    /// Returns the requests to a projection from `from` on.
    pub(crate) async fn requests<S: Session>(
        &self,
        session: &mut S,
        projection: &str,
        from: Request,
        limit: usize,
    ) -> Result<Vec<StoredRequest>, StoreError> {
        let doing = format!("reading the requests to projection {projection}");
        let [name, kind, position] = requested(projection, from);
        let values = [name, kind, position, Value::Number(limit as u64)];
        let rows = self.fetch(session, &self.sql.requests, &values, &doing).await?;
        rows.iter().map(stored_request).collect::<Result<_, _>>().map_err(|error| S::failed(&doing, error))
    }

    /// Makes a write in the transaction of the session.
    ///
    /// If two sessions move the same checkpoint, the second waits for the end of the first
    /// transaction.
    pub(crate) async fn write<S: Session>(
        &self,
        session: &mut S,
        store: Uuid,
        write: &ProgressWrite,
    ) -> Result<(), CheckpointError> {
        match write {
            ProgressWrite::Checkpoint { key, from, to } => self.save(session, store, key, *from, *to).await,
            ProgressWrite::Projection { name, from, to } => {
                let sql = match from.revision {
                    0 => &self.sql.create_projection,
                    _ => &self.sql.update_projection,
                };
                let values = [
                    Value::Text(name),
                    Value::Id(Some(store)),
                    Value::Number(to.partitions.into()),
                    Value::Number(to.live_version),
                    Value::OptionalNumber(to.building_version),
                    Value::OptionalNumber(to.start_position.map(Position::get)),
                    Value::Number(from.revision),
                ];
                let doing = format!("changing projection {name}");
                match self.execute(session, sql, &values, &doing).await? {
                    0 => Err(CheckpointError::Changed { projection: name.clone() }),
                    _ => Ok(()),
                }
            }
            ProgressWrite::Park { key, event } => self.park(session, key, event).await.map_err(Into::into),
            ProgressWrite::Unpark { key, position } => {
                match self.unpark(session, key, *position..=*position).await? {
                    0 => Err(CheckpointError::not_parked(key, *position)),
                    _ => Ok(()),
                }
            }
            ProgressWrite::UnparkAll { key } => {
                self.unpark(session, key, Position::START..=Position::new(u64::MAX)).await?;
                Ok(())
            }
            ProgressWrite::AddRequest { projection, request } => {
                let [name, kind, position] = requested(projection, request.request);
                let reason = Value::OptionalText(request.refused_reason.as_deref());
                let values = [
                    name,
                    kind,
                    position,
                    Value::Id(Some(request.id)),
                    Value::Time(request.requested_at),
                    reason,
                ];
                let doing = format!("storing a request to projection {projection}");
                self.execute(session, &self.sql.add_request, &values, &doing).await?;
                Ok(())
            }
            ProgressWrite::RemoveRequest { projection, request, id } => {
                let [name, kind, position] = requested(projection, *request);
                let values = [name, kind, position, Value::Id(*id)];
                let doing = format!("deleting a request to projection {projection}");
                match self.execute(session, &self.sql.remove_request, &values, &doing).await? {
                    0 => Err(CheckpointError::not_requested(projection, *request)),
                    _ => Ok(()),
                }
            }
            ProgressWrite::RefuseRequest { projection, request, id, reason } => {
                let [name, kind, position] = requested(projection, *request);
                let reason = storable(reason);
                let values = [name, kind, position, Value::Id(Some(*id)), Value::Text(&reason)];
                let doing = format!("refusing a request to projection {projection}");
                match self.execute(session, &self.sql.refuse_request, &values, &doing).await? {
                    0 => Err(CheckpointError::not_requested(projection, *request)),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Moves a checkpoint from exactly `from` to `to`.
    async fn save<S: Session>(
        &self,
        session: &mut S,
        store: Uuid,
        key: &CheckpointKey,
        from: Checkpoint,
        to: Checkpoint,
    ) -> Result<(), CheckpointError> {
        let sql = match from == Checkpoint::default() {
            true => &self.sql.create_checkpoint,
            false => &self.sql.update_checkpoint,
        };
        let [name, version, partition] = of(key);
        let values = [
            name,
            version,
            partition,
            Value::Id(Some(store)),
            Value::Number(to.position.get()),
            Value::Number(to.epoch),
            Value::Number(to.generation),
            Value::Number(to.delivered.get()),
            Value::Number(from.position.get()),
            Value::Number(from.epoch),
            Value::Number(from.generation),
        ];
        let doing = || format!("saving the checkpoint of {key}");
        if to.epoch >= from.epoch && self.execute(session, sql, &values, &doing()).await? == 1 {
            return Ok(());
        }
        let found = self.checkpoint(session, key, store).await?;
        Err(CheckpointError::Stale { key: key.clone(), expected: from, found })
    }

    async fn park<S: Session>(
        &self,
        session: &mut S,
        key: &CheckpointKey,
        event: &ParkedEvent,
    ) -> Result<(), StoreError> {
        let [name, version, partition] = of(key);
        let error = storable(&event.error);
        let values = [
            name,
            version,
            partition,
            Value::Number(event.position.get()),
            Value::Id(Some(event.event_id)),
            Value::Text(event.stream.category()),
            Value::Text(event.stream.id()),
            Value::Number(event.version.get()),
            Value::Text(event.name.as_str()),
            Value::Text(&error),
            Value::Number(event.attempts.into()),
            Value::Time(event.parked_at),
        ];
        self.execute(session, &self.sql.park, &values, &format!("parking an event of {key}")).await.map(drop)
    }

    /// Deletes the parked events at these positions; returns their number.
    async fn unpark<S: Session>(
        &self,
        session: &mut S,
        key: &CheckpointKey,
        positions: RangeInclusive<Position>,
    ) -> Result<u64, StoreError> {
        let [name, version, partition] = of(key);
        let (first, last) = (Value::Number(positions.start().get()), Value::Number(positions.end().get()));
        let values = [name, version, partition, first, last];
        self.execute(session, &self.sql.unpark, &values, &format!("removing parked events of {key}")).await
    }
}

fn of(key: &CheckpointKey) -> [Value<'_>; 3] {
    [Value::Text(&key.projection), Value::Number(key.version), Value::Number(key.partition.into())]
}

fn requested(projection: &str, request: Request) -> [Value<'_>; 3] {
    [Value::Text(projection), Value::Text(request.kind()), Value::Number(request.position().get())]
}

/// Returns a text that can come from any source; PostgreSQL cannot store NUL.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

fn same_store(what: &str, found: Uuid, store: Uuid) -> Result<(), StoreError> {
    if found == store {
        return Ok(());
    }
    Err(StoreError::Incompatible {
        expected: format!("the progress of {what} in event store {store}"),
        found: format!("progress in event store {found}"),
        advice: "the event store or the read model was replaced or restored: connect the right pair, or reset the projection to rebuild it".into(),
    })
}
