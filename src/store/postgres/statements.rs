//! The SQL statements, with the name of the schema.
//!
//! Names are qualified instead of left to `search_path`, because a pooler in transaction mode gives
//! every transaction another session. The texts are built once: as shared strings they are cheap to
//! pass on, and remain the keys of each connection's prepared statements.

use std::sync::Arc;

use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

use super::super::StoreError;
use super::super::sql::statements;

/// A schema with a checked name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Schema(Arc<str>);

impl Schema {
    pub(crate) const DEFAULT: &'static str = "storied";

    /// Returns the default schema.
    pub(crate) fn standard() -> Self {
        Self(Self::DEFAULT.into())
    }

    /// Checks a schema name.
    ///
    /// # Errors
    /// `Invalid` for a name that PostgreSQL would require quotes for, would truncate, or reserves.
    pub(crate) fn new(name: &str) -> Result<Self, StoreError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        let starts_well = name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_');
        let reserved = name.starts_with("pg_") || name == "information_schema";
        if !starts_well || name.len() > 63 || !name.bytes().all(plain) || reserved {
            return Err(StoreError::Invalid {
                reason: format!(
                    "{:?} cannot be the schema of an event store: use 1 to 63 lower-case ASCII letters, digits or '_', beginning with a letter or '_' but not with 'pg_'; 'information_schema' is PostgreSQL's own",
                    name.chars().take(80).collect::<String>()
                ),
            });
        }
        Ok(Self(name.into()))
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    /// Rewrites `sql`, written for the schema `storied`, for this schema.
    ///
    /// The name is quoted, because it may be a keyword such as `user`.
    pub(crate) fn text(&self, sql: &str) -> SqlStr {
        let sql: Arc<str> = sql.replace("storied.", &format!("\"{}\".", self.0)).into();
        AssertSqlSafe(sql).into_sql_str()
    }
}

statements! {
    /// The statements of the log.
    ///
    /// Statements that read the log call pg_current_wal_lsn() once for each execution: a standby
    /// rejects that. A pooler may send reads to a standby, which lacks the newest events and does
    /// not see the locks of the primary (I1).
    LogSql {
        append: "SELECT streams, versions, lost, positions, transaction_id, settled
            FROM storied.append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)",
        append_known: "SELECT storied.append_known($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        append_one: "SELECT storied.append_one($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        append_tagged: "SELECT streams, versions, lost, positions, transaction_id, settled
            FROM storied.append_tagged($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)",
        append_known_tagged: "SELECT storied.append_known_tagged($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
        append_one_tagged: "SELECT storied.append_one_tagged($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
        append_unless: "SELECT streams, versions, lost, positions, transaction_id, settled, crossed, busy
            FROM storied.append_unless($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19,
                $20, $21, $22, $23, $24, $25, $26, $27)",
        number_names: "SELECT numbers, server FROM storied.number_names($1)",
        // Ranges with an order leave PostgreSQL no other plan.
        names: "SELECT n.number, n.name FROM unnest($1::integer[]) AS wanted (number) CROSS JOIN LATERAL (
                SELECT number, name FROM storied.names WHERE number >= wanted.number AND number <= wanted.number
                ORDER BY number LIMIT 1) AS n
            WHERE (SELECT pg_current_wal_lsn()) IS NOT NULL",
        streams: "SELECT s.number, c.name, s.stream_id FROM unnest($1::bigint[]) AS wanted (number) CROSS JOIN LATERAL (
                SELECT number, category, stream_id FROM storied.streams
                WHERE number >= wanted.number AND number <= wanted.number
                ORDER BY number LIMIT 1) AS s CROSS JOIN LATERAL (
                SELECT name FROM storied.names WHERE number >= s.category AND number <= s.category
                ORDER BY number LIMIT 1) AS c
            WHERE (SELECT pg_current_wal_lsn()) IS NOT NULL",
        find: "SELECT version, position, id FROM storied.events
            WHERE stream = (SELECT storied.stream_number($1, $2)) AND version > $3 AND version <= $4 AND id = ANY($5)
                AND (SELECT pg_current_wal_lsn()) IS NOT NULL ORDER BY version",
        // $1 is an event that an earlier query found. This statement sees its row, unless the
        // server lost it.
        high_water_mark: "SELECT f.last_value, f.low_water, f.head, f.head_id,
                (SELECT e.id FROM storied.events AS e WHERE e.position >= $1 AND e.position <= $1 ORDER BY e.position LIMIT 1),
                current_setting('synchronous_standby_names') <> '', storied.server()
            FROM storied.high_water_mark() AS f",
        event_at: "SELECT id FROM storied.events
            WHERE position >= $1 AND position <= $1 AND (SELECT pg_current_wal_lsn()) IS NOT NULL ORDER BY position LIMIT 1",
        stream: "SELECT position, version, name, id, command_id, payload, metadata, recorded_at, stream, (SELECT storied.server())
            FROM storied.events WHERE stream = (SELECT storied.stream_number($1, $2)) AND version > $3
                AND (SELECT pg_current_wal_lsn()) IS NOT NULL
            ORDER BY version LIMIT $4",
        command_events: "SELECT n, first_version, last_version, last_position FROM storied.command_events($1, $2, $3)
            WHERE (SELECT pg_current_wal_lsn()) IS NOT NULL",
        log: "SELECT position, version, name, id, command_id, payload, metadata, recorded_at, stream
            FROM storied.events WHERE position > $1 AND position <= $2 AND (SELECT pg_current_wal_lsn()) IS NOT NULL
            ORDER BY position LIMIT $3",
        // As `log`, with the id of the event at $1: NULL on a server without that event.
        // With the streams in clear: a stream's first event must not cost another round trip.
        adjacent: "SELECT e.position, e.version, e.name, e.id, e.command_id, e.payload, e.metadata, e.recorded_at, e.stream,
                (SELECT k.id FROM storied.events AS k WHERE k.position = $1), s.category, s.stream_id
            FROM (
                SELECT * FROM storied.events WHERE position > $1 AND (SELECT pg_current_wal_lsn()) IS NOT NULL
                ORDER BY position LIMIT $2
            ) AS e LEFT JOIN LATERAL (
                SELECT stream_id, (
                    SELECT name FROM storied.names WHERE number >= streams.category AND number <= streams.category
                    ORDER BY number LIMIT 1) AS category
                FROM storied.streams WHERE number >= e.stream AND number <= e.stream ORDER BY number LIMIT 1
            ) AS s ON true ORDER BY e.position",
        // A null filter passes everything. OFFSET 0: PostgreSQL cannot look streams or names up by
        // other indexes.
        filtered: "SELECT position, version, name, id, command_id, payload, metadata, recorded_at, stream
            FROM (
                SELECT position, version, name, id, command_id, payload, metadata, recorded_at, stream, category
                FROM storied.events WHERE position > $1 AND position <= $2 ORDER BY position OFFSET 0
            ) AS e
            WHERE ($4::text[] IS NULL OR e.name IN (SELECT n.number FROM storied.names AS n WHERE n.name = ANY($4)))
                AND ($5::text[] IS NULL OR e.category IN (SELECT n.number FROM storied.names AS n WHERE n.name = ANY($5)))
                AND ($6::text[] IS NULL OR e.stream IN (
                    SELECT storied.stream_number(w.category, w.stream_id) FROM unnest($6, $7::text[]) AS w (category, stream_id)))
                AND (SELECT pg_current_wal_lsn()) IS NOT NULL
            ORDER BY position LIMIT $3",
        // First positions, which the index by name covers, then the events one by one. The form
        // leaves PostgreSQL no other plan: it would scan the log if a name is frequent or has no
        // statistics. An event is looked up by a range with an order: the index by name also fits
        // `position = …`, but has no such order.
        by_name: "SELECT e.*
            FROM (
                SELECT i.position
                FROM (SELECT n.number FROM storied.names AS n WHERE n.name = ANY($4::text[]) OFFSET 0) AS wanted
                CROSS JOIN LATERAL (
                    SELECT position FROM storied.events
                    WHERE (name, position) > (wanted.number, $1) AND (name, position) <= (wanted.number, $2)
                    ORDER BY name, position LIMIT $3) AS i
                ORDER BY i.position LIMIT $3
            ) AS found CROSS JOIN LATERAL (
                SELECT position, version, name, id, command_id, payload, metadata, recorded_at, stream
                FROM storied.events WHERE position >= found.position AND position <= found.position
                ORDER BY position LIMIT 1
            ) AS e
            WHERE (SELECT pg_current_wal_lsn()) IS NOT NULL ORDER BY found.position",
        // The events of command $1 have no order by position: they are few. Each part has one possible
        // index, as in `by_name`.
        correlated: "SELECT e.*, found.position
            FROM (
                SELECT f.position FROM (
                    SELECT c.position FROM (
                        SELECT position FROM storied.events
                        WHERE (command_id, stream, version) >= ($1, -9223372036854775808, 0)
                            AND (command_id, stream, version) <= ($1, 9223372036854775807, 9223372036854775807)
                        ORDER BY command_id, stream, version OFFSET 0) AS c
                    WHERE c.position > $2 AND c.position <= $3
                    UNION
                    SELECT i.position FROM (
                        SELECT position FROM storied.correlations
                        WHERE (correlation_id, position) > ($1, $2) AND (correlation_id, position) <= ($1, $3)
                        ORDER BY correlation_id, position LIMIT $4) AS i
                ) AS f ORDER BY f.position LIMIT $4
            ) AS found LEFT JOIN LATERAL (
                SELECT position, version, name, id, command_id, payload, metadata, recorded_at, stream
                FROM storied.events WHERE position >= found.position AND position <= found.position
                ORDER BY position LIMIT 1
            ) AS e ON true
            WHERE (SELECT pg_current_wal_lsn()) IS NOT NULL ORDER BY found.position",
        // Each event once, also if it matches several items.
        matching: "SELECT e.*, found.position
            FROM (
                SELECT DISTINCT m.position FROM storied.matching($1, $2, $3, $4, $5, $6, $7) AS m (position)
                ORDER BY m.position LIMIT $7
            ) AS found LEFT JOIN LATERAL (
                SELECT position, version, name, id, command_id, payload, metadata, recorded_at, stream
                FROM storied.events WHERE position >= found.position AND position <= found.position
                ORDER BY position LIMIT 1
            ) AS e ON true
            WHERE (SELECT pg_current_wal_lsn()) IS NOT NULL ORDER BY found.position",
        // The last event among the $3 positions after the first event after $1, up to $2.
        last_event: "SELECT (
                SELECT e.position FROM storied.events AS e
                WHERE e.position >= f.position AND e.position <= f.position + least($3, $2 - f.position)
                ORDER BY e.position DESC LIMIT 1)
            FROM (
                SELECT position FROM storied.events WHERE position > $1 AND position <= $2
                    AND (SELECT pg_current_wal_lsn()) IS NOT NULL
                ORDER BY position LIMIT 1) AS f",
        // The transaction with the lowest low-water lock.
        stall: "SELECT l.pid, coalesce(a.application_name, ''), coalesce(a.state, CASE WHEN l.pid IS NULL THEN 'a prepared transaction' ELSE 'hidden from this login' END),
                coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::float8,
                left(coalesce(a.query, ''), 300), l.key
            FROM (
                SELECT pid, ((classid::bigint << 32) | objid::bigint) & ((1::bigint << 44) - 1) AS key
                FROM pg_locks
                WHERE locktype = 'advisory' AND objsubid = 1
                    AND (classid::bigint >> 12) = ('storied.positions'::regclass::oid::bigint & 1048575)
                    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            ) AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
            ORDER BY l.key, a.xact_start LIMIT 1",
        record_home: "INSERT INTO storied.meta (key, value)
            SELECT 'server', system_identifier::text FROM pg_control_system()
            UNION ALL SELECT 'database_oid', oid::text FROM pg_database WHERE datname = current_database()
            UNION ALL SELECT 'database', current_database()
            UNION ALL SELECT 'schema_oid', n.oid::text FROM pg_catalog.pg_class AS c
                JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = 'storied.meta'::regclass
            UNION ALL SELECT 'schema', n.nspname FROM pg_catalog.pg_class AS c
                JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = 'storied.meta'::regclass
            ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        new_identity: "UPDATE storied.meta SET value = $1 WHERE key = 'store_id'",
        // The publisher of the copy cannot use the checkpoint of the original's bus.
        disown_publisher: "DELETE FROM storied.publisher",
        own_projections: "UPDATE storied.projections SET store_id = $2 WHERE store_id = $1",
        own_checkpoints: "UPDATE storied.checkpoints SET store_id = $2 WHERE store_id = $1",
        // The epochs stay, because checkpoints contain them.
        free_leases: "UPDATE storied.leases SET expires_at = 'epoch'",
        acquire_lease: "INSERT INTO storied.leases AS l (name, owner, epoch, expires_at, ttl)
            VALUES ($1, $2, 1, clock_timestamp() + $3 * interval '1 microsecond', $3)
            ON CONFLICT (name) DO UPDATE SET
                owner = $2,
                epoch = l.epoch + (l.owner <> $2)::int,
                expires_at = clock_timestamp() + $3 * interval '1 microsecond',
                ttl = $3
            WHERE l.owner = $2 OR l.expires_at <= clock_timestamp()
            RETURNING epoch",
        take_over_lease: "UPDATE storied.leases SET
                owner = $2,
                epoch = epoch + (owner <> $2)::int,
                expires_at = clock_timestamp() + $3 * interval '1 microsecond',
                ttl = $3
            WHERE name = $1 AND epoch = $4 AND expires_at = $5
            RETURNING epoch",
        // Sorted, so that calls with common leases wait in one order.
        renew_leases: "WITH held AS (
                SELECT l.name FROM storied.leases AS l
                JOIN unnest($1::text[], $2::uuid[], $3::bigint[]) AS h (name, owner, epoch)
                    ON l.name = h.name AND l.owner = h.owner AND l.epoch = h.epoch
                WHERE l.expires_at > 'epoch' ORDER BY l.name FOR UPDATE OF l
            )
            UPDATE storied.leases AS l
            SET expires_at = clock_timestamp() + $4 * interval '1 microsecond', ttl = $4
            FROM held WHERE l.name = held.name
            RETURNING l.name, l.owner, l.epoch",
        release_lease: "UPDATE storied.leases SET expires_at = 'epoch'
            WHERE name = $1 AND owner = $2 AND epoch = $3 AND expires_at > 'epoch'",
        leases: "SELECT name, owner, epoch, expires_at, expires_at > clock_timestamp(), ttl FROM storied.leases ORDER BY name",
        snapshot: "SELECT version, revision, state FROM storied.snapshots WHERE category = $1 AND stream_id = $2",
        save_snapshot: "INSERT INTO storied.snapshots AS s (category, stream_id, version, revision, state)
            VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (category, stream_id) DO UPDATE SET version = $3, revision = $4, state = $5
            WHERE s.revision <> $4 OR s.version <= $3",
        commands: "SELECT id, name, fingerprint, outcome, recorded_at FROM storied.commands
            WHERE id = ANY($1) AND (SELECT pg_current_wal_lsn()) IS NOT NULL",
        // Sorted, so that calls with common commands wait in the same order.
        record_commands: "INSERT INTO storied.commands (id, name, fingerprint, outcome)
            SELECT * FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::bytea[]) AS c (id, name, fingerprint, outcome)
            ORDER BY id ON CONFLICT (id) DO NOTHING RETURNING id, name, fingerprint, outcome, recorded_at",
        // An array instead of a join, which could read the whole table. The time comes from a
        // subquery, because an index cannot be searched for a volatile value.
        forget_commands: "DELETE FROM storied.commands WHERE id = ANY(ARRAY(
            SELECT id FROM storied.commands
            WHERE recorded_at <= (SELECT clock_timestamp() - $1 * interval '1 microsecond')
            ORDER BY recorded_at LIMIT $2 FOR UPDATE SKIP LOCKED))",
        write_timers: "SELECT storied.write_timers($1, $2, $3, $4, $5, $6, $7)",
        // The due timers, and the next one; one row without a timer if there is none, so that a
        // standby always evaluates the clock. The time comes from a subquery, because an index cannot
        // be searched for a volatile value. The collation and `version >= 0` choose the index.
        due_timers: "WITH clock AS MATERIALIZED (
                SELECT clock_timestamp() AS now WHERE pg_current_wal_lsn() IS NOT NULL
            )
            SELECT e.process, e.instance, e.name, e.version, e.due_at, c.now
            FROM clock AS c LEFT JOIN (
                (SELECT process, instance, name, version, due_at FROM storied.timers
                    WHERE (process COLLATE ucs_basic, due_at) >= ($1, '-infinity')
                        AND (process COLLATE ucs_basic, due_at) <= ($1, (SELECT now FROM clock)) AND version >= 0
                    ORDER BY process COLLATE ucs_basic, due_at, instance, name LIMIT $2)
                UNION ALL
                (SELECT process, instance, name, version, due_at FROM storied.timers
                    WHERE (process COLLATE ucs_basic, due_at) > ($1, (SELECT now FROM clock))
                        AND (process COLLATE ucs_basic, due_at) <= ($1, 'infinity') AND version >= 0
                    ORDER BY process COLLATE ucs_basic, due_at, instance, name LIMIT 1)
            ) AS e ON true ORDER BY e.due_at, e.instance, e.name",
        // One page of each process, after the timer at $2 to $5: at its due time, only processes after
        // its own have more timers.
        timers: "WITH RECURSIVE processes AS (
                SELECT coalesce($1, (SELECT t.process FROM storied.timers AS t WHERE t.process > '' ORDER BY t.process LIMIT 1)) AS process
                FROM (SELECT pg_current_wal_lsn() AS lsn OFFSET 0) AS server WHERE server.lsn IS NOT NULL
                UNION ALL
                SELECT (SELECT t.process FROM storied.timers AS t WHERE t.process > p.process ORDER BY t.process LIMIT 1)
                FROM processes AS p WHERE p.process IS NOT NULL AND $1 IS NULL
            )
            SELECT f.process, f.instance, f.name, f.version, f.due_at
            FROM (
                SELECT p.process,
                    coalesce($2, '-infinity') + CASE WHEN p.process < $3 THEN interval '1 microsecond' ELSE interval '0' END AS due_at,
                    CASE WHEN p.process = $3 THEN $4 ELSE '' END AS instance,
                    CASE WHEN p.process = $3 THEN $5 ELSE '' END AS name
                FROM processes AS p WHERE p.process IS NOT NULL OFFSET 0
            ) AS start CROSS JOIN LATERAL (
                SELECT t.process, t.instance, t.name, t.version, t.due_at FROM storied.timers AS t
                WHERE (t.process COLLATE ucs_basic, t.due_at, t.instance, t.name) > (start.process, start.due_at, start.instance, start.name)
                    AND t.process COLLATE ucs_basic <= start.process AND t.version >= 0
                ORDER BY t.process COLLATE ucs_basic, t.due_at, t.instance, t.name LIMIT $6
            ) AS f ORDER BY f.due_at, f.process, f.instance, f.name LIMIT $6",
        schedule_commands: "SELECT command_id AS id, command_target AS target, command_body AS body, command_due_at AS due_at,
                command_schedule AS schedule, command_state AS state, command_reason AS reason, added
            FROM storied.schedule_commands($1, $2, $3, $4, $5, $6)",
        start_due_commands: "SELECT command_id AS id, command_target AS target, command_body AS body, command_due_at AS due_at,
                command_schedule AS schedule, clock, next_due_at
            FROM storied.start_due_commands($1, $2)",
        end_commands: "SELECT storied.end_commands($1, $2, $3, $4, $5, $6)",
        cancel_command: "SELECT id, target, body, due_at, schedule, state, reason FROM storied.cancel_command($1)",
        retry_command: "SELECT id, target, body, due_at, schedule, state, reason FROM storied.retry_command($1)",
        scheduled_command: "SELECT id, target, body, due_at, schedule, state, reason FROM storied.scheduled_commands
            WHERE id = $1 AND (SELECT pg_current_wal_lsn()) IS NOT NULL",
        // One page of each state, after the command at $2 and $3, up to $5 bytes of bodies. The
        // condition on the target chooses the index.
        scheduled_commands: "SELECT p.id, p.target, p.body, p.due_at, p.schedule, p.state, p.reason
            FROM (
                SELECT f.*, sum(octet_length(f.body)) OVER (ORDER BY f.due_at, f.id ROWS UNBOUNDED PRECEDING) - octet_length(f.body) AS bytes_before
                FROM (
                    SELECT c.* FROM unnest($1::text[]) AS wanted (state) CROSS JOIN LATERAL (
                        SELECT id, target, body, due_at, schedule, state, reason FROM storied.scheduled_commands
                        WHERE state = wanted.state AND (due_at, id) > (coalesce($2, '-infinity'), $3) AND octet_length(target) > 0
                        ORDER BY due_at, id LIMIT $4) AS c
                    ORDER BY c.due_at, c.id LIMIT $4) AS f
            ) AS p WHERE p.bytes_before < $5 AND (SELECT pg_current_wal_lsn()) IS NOT NULL ORDER BY p.due_at, p.id",
        // As `scheduled_commands`, of the schedule $6, which chooses the index.
        scheduled_commands_of: "SELECT p.id, p.target, p.body, p.due_at, p.schedule, p.state, p.reason
            FROM (
                SELECT f.*, sum(octet_length(f.body)) OVER (ORDER BY f.due_at, f.id ROWS UNBOUNDED PRECEDING) - octet_length(f.body) AS bytes_before
                FROM (
                    SELECT c.* FROM unnest($1::text[]) AS wanted (state) CROSS JOIN LATERAL (
                        SELECT id, target, body, due_at, schedule, state, reason FROM storied.scheduled_commands
                        WHERE schedule = $6 AND state = wanted.state AND (due_at, id) > (coalesce($2, '-infinity'), $3)
                        ORDER BY due_at, id LIMIT $4) AS c
                    ORDER BY c.due_at, c.id LIMIT $4) AS f
            ) AS p WHERE p.bytes_before < $5 AND (SELECT pg_current_wal_lsn()) IS NOT NULL ORDER BY p.due_at, p.id",
        write_schedule: "SELECT storied.write_schedule($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        remove_schedule: "SELECT storied.remove_schedule($1, $2)",
        schedule: "SELECT name, definition, revision, next_at FROM storied.schedules
            WHERE name = $1 AND (SELECT pg_current_wal_lsn()) IS NOT NULL",
        schedules: "SELECT name, definition, revision, next_at FROM storied.schedules
            WHERE name > $1 AND (SELECT pg_current_wal_lsn()) IS NOT NULL ORDER BY name LIMIT $2",
        // As `due_timers`: `revision >= 0` chooses the index.
        due_schedules: "WITH clock AS MATERIALIZED (
                SELECT clock_timestamp() AS now WHERE pg_current_wal_lsn() IS NOT NULL
            )
            SELECT e.name, e.definition, e.revision, e.next_at, c.now
            FROM clock AS c LEFT JOIN (
                (SELECT name, definition, revision, next_at FROM storied.schedules
                    WHERE next_at <= (SELECT now FROM clock) AND revision >= 0 ORDER BY next_at, name LIMIT $1)
                UNION ALL
                (SELECT name, definition, revision, next_at FROM storied.schedules
                    WHERE next_at > (SELECT now FROM clock) AND revision >= 0 ORDER BY next_at, name LIMIT 1)
            ) AS e ON true ORDER BY e.next_at, e.name",
    }
}
