//! Logins with exactly the rights of docs/postgres-grants.sql, and attempts at everything else.

use sqlx::{AssertSqlSafe, Executor, PgConnection, PgPool, Row};
use storied::projection::ReadModel;
use storied::store::{
    Append, AppendError, CheckpointKey, ControlChange, DueTime, NewScheduledCommand, Query, QueryStore,
    Request, ScheduleStore, ScheduledEnd, ScheduledOutcome, ScheduledQuery, StoredSchedule, TimerRef,
};
use storied::{
    EventStore, ExpectedVersion, Position, PostgresOptions, PostgresReadModel, PostgresStore, StoreError,
    Version,
};

use crate::postgres::tools::{append, as_user, assert_sound, connect, events, exact, run, stream, whole_log};
use crate::support::PostgresServer;

const GRANTS: &str = include_str!("../../../docs/postgres-grants.sql");

/// Creates a database with an empty store and the logins `shop`, `shop_reader` and `shop_view`.
pub async fn granted(server: &PostgresServer) -> String {
    let roles = "DO $$ BEGIN
                     PERFORM pg_advisory_xact_lock(1);
                     IF to_regrole('shop') IS NULL THEN
                         CREATE ROLE shop LOGIN; CREATE ROLE shop_reader LOGIN; CREATE ROLE shop_view LOGIN;
                     END IF;
                 END $$";
    run(&server.url(), roles).await;
    let url = server.create_database().await;
    PostgresStore::connect(&url).await.unwrap();
    // Role memberships belong to the server, not the database: two grants at once would collide.
    let grants =
        format!("BEGIN; LOCK pg_catalog.pg_auth_members IN SHARE ROW EXCLUSIVE MODE; {GRANTS}; COMMIT");
    run(&url, &grants).await;
    url
}

fn as_program(url: &str) -> PostgresOptions {
    PostgresOptions::new().url(as_user(url, "shop")).migrate(false)
}

/// The document contains the rights that the tests use.
#[test]
fn the_grants_of_the_document_are_those_that_are_tested() {
    let operations = include_str!("../../../docs/operations.md");
    let shown = operations.split("```").find_map(|block| block.strip_prefix("sql\n")).unwrap();
    assert_eq!(shown, GRANTS);
}

/// A login that is no superuser, in a database of its own, as most applications have it.
#[tokio::test]
async fn the_owner_of_a_database_migrates_it_and_appends() {
    let server = PostgresServer::shared().await;
    let url = server.create_database().await;
    let name = url.rsplit('/').next().unwrap();
    // Roles belong to the server, which tests share.
    let owner = format!("owner_of_{name}");
    run(&url, &format!("CREATE ROLE {owner} LOGIN; ALTER DATABASE {name} OWNER TO {owner}")).await;
    let own = as_user(&url, &owner);
    let store = PostgresStore::connect(&own).await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(1)).await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::Any, events(3)).await.unwrap();
    assert_sound(&whole_log(&store).await);
    let read_model = PostgresReadModel::new(PgPool::connect(&own).await.unwrap());
    let store: std::sync::Arc<dyn EventStore> = std::sync::Arc::new(store);
    read_model.prepare(&store).await.unwrap();
    // The owner's own INSERT stays refused, also in the transaction of an append.
    let mut connection = connect(&own).await;
    let insert =
        "INSERT INTO storied.events SELECT 99, stream, 9, now(), name, category, id, id, payload, metadata
                  FROM storied.events LIMIT 1";
    let one = "SELECT storied.append_one(storied.server(), 4, stream, NULL, 4, category, name, gen_random_uuid(), gen_random_uuid(), payload, metadata, true)
               FROM storied.events LIMIT 1";
    for before in ["SELECT 1", one] {
        connection.execute(AssertSqlSafe(format!("BEGIN; {before}"))).await.unwrap();
        let error = connection.execute(insert).await.unwrap_err().to_string();
        assert!(error.contains("would be missed"), "{error}");
        connection.execute("ROLLBACK").await.unwrap();
    }
}

/// Compares the whole table of rights. A new table or function fails here and must be added to
/// docs/postgres-grants.sql.
#[tokio::test]
async fn nothing_else_is_granted() {
    let url = granted(PostgresServer::shared().await).await;
    let mut connection = connect(&url).await;
    for (role, expected) in [
        (
            "shop",
            "checkpoints INSERT SELECT UPDATE, commands DELETE INSERT SELECT, controls INSERT SELECT UPDATE, correlations SELECT, events SELECT, \
             leases INSERT SELECT UPDATE, meta SELECT, migrations SELECT, names SELECT, parked DELETE INSERT SELECT UPDATE, \
             positions SELECT, projections INSERT SELECT UPDATE, publisher INSERT SELECT UPDATE, \
             read_model_migrations SELECT, requests DELETE INSERT SELECT UPDATE, scheduled_commands DELETE INSERT SELECT UPDATE, \
             schedules DELETE INSERT SELECT UPDATE, snapshots INSERT SELECT UPDATE, \
             streams SELECT, tags SELECT, timers DELETE INSERT SELECT UPDATE; \
             append, append_known, append_known_tagged, append_one, append_one_tagged, append_tagged, append_unless, \
             cancel_command, command_events, end_commands, high_water_mark, matching, number_names, \
             remove_schedule, retry_command, schedule_commands, server, start_due_commands, stream_number, \
             write_schedule, write_timers",
        ),
        (
            "shop_reader",
            "checkpoints SELECT, commands SELECT, controls SELECT, correlations SELECT, events SELECT, leases SELECT, meta SELECT, \
             migrations SELECT, names SELECT, parked SELECT, positions SELECT, projections SELECT, publisher SELECT, \
             read_model_migrations SELECT, requests SELECT, scheduled_commands SELECT, schedules SELECT, snapshots SELECT, streams SELECT, tags SELECT, timers SELECT; \
             high_water_mark, matching, server, stream_number",
        ),
        (
            "shop_view",
            "checkpoints INSERT SELECT UPDATE, parked DELETE INSERT SELECT UPDATE, projections INSERT SELECT UPDATE, \
             read_model_migrations SELECT, requests DELETE INSERT SELECT UPDATE; ",
        ),
    ] {
        let rights: String = sqlx::query_scalar(
            "SELECT (SELECT string_agg(relname || ' ' || rights, ', ' ORDER BY relname COLLATE \"C\") FROM (
                 SELECT relname, string_agg(p, ' ' ORDER BY p) AS rights
                 FROM pg_class AS c, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER', 'USAGE']) AS p
                 WHERE relnamespace = 'storied'::regnamespace AND CASE relkind
                     WHEN 'r' THEN p <> 'USAGE' AND has_table_privilege($1, c.oid, CASE WHEN p = 'USAGE' THEN 'SELECT' ELSE p END)
                     WHEN 'S' THEN p IN ('SELECT', 'UPDATE', 'USAGE') AND has_sequence_privilege($1, c.oid, CASE WHEN p IN ('SELECT', 'UPDATE', 'USAGE') THEN p ELSE 'SELECT' END)
                 END GROUP BY relname) AS tables)
             || '; ' ||
             coalesce((SELECT string_agg(proname, ', ' ORDER BY proname COLLATE \"C\") FROM pg_proc
                 WHERE pronamespace = 'storied'::regnamespace AND prorettype <> 'trigger'::regtype
                     AND has_function_privilege($1, oid, 'EXECUTE')), '')",
        )
        .bind(role)
        .fetch_one(&mut connection)
        .await
        .unwrap();
        assert_eq!(rights, expected, "{role}");
    }
    // Functions that run with their owner's rights have their own search_path.
    let unsafe_functions: Vec<String> = sqlx::query_scalar(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'storied'::regnamespace AND prosecdef
             AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    assert!(unsafe_functions.is_empty(), "{unsafe_functions:?}");
}

/// Runs `sql` in a transaction of its own.
async fn attempt(connection: &mut PgConnection, sql: &str) -> Result<(), sqlx::Error> {
    connection.execute("BEGIN").await?;
    let done = connection.execute(AssertSqlSafe(sql.to_owned())).await;
    connection.execute(if done.is_ok() { "COMMIT" } else { "ROLLBACK" }).await?;
    done.map(drop)
}

const SERVER: &str = "storied.server()";

/// Returns a call of `storied.append()` for two parts with an event each, with changed arguments.
fn forged(changes: &[(&str, &str)]) -> String {
    let arguments = [
        ("server", SERVER),
        ("position", "NULL"),
        ("stream", "ARRAY[NULL, NULL]::bigint[]"),
        ("category", "n.numbers[1:2]"),
        ("id", "ARRAY['x', 'y']"),
        ("unit", "ARRAY[0, 1]"),
        ("expected", "ARRAY[0, 0]::bigint[]"),
        ("events", "ARRAY[1, 1]"),
        ("look_up", "false"),
        ("used", "n.numbers[2:3]"),
        ("name", "ARRAY[n.numbers[3], n.numbers[3]]"),
        ("event_id", "ARRAY[gen_random_uuid(), gen_random_uuid()]"),
        ("command_id", "ARRAY[gen_random_uuid(), gen_random_uuid()]"),
        ("payload", "ARRAY['', '']::bytea[]"),
        ("metadata", "ARRAY['', '']::bytea[]"),
    ];
    let called = call("append", arguments, changes);
    format!(
        "SELECT a.* FROM storied.number_names(ARRAY['order', 'order', 'order.placed']) AS n, {called} AS a"
    )
}

/// Like [`forged`], for `storied.append_one()`; without changes it follows the event at version 3 of
/// `order/a`.
fn forged_one(changes: &[(&str, &str)]) -> String {
    let arguments = [
        ("server", SERVER),
        ("position", "3"),
        ("stream", "storied.stream_number('order', 'a')"),
        ("stream_id", "NULL"),
        ("expected", "3"),
        ("category", "n.numbers[1]"),
        ("name", "n.numbers[2]"),
        ("event_id", "gen_random_uuid()"),
        ("command_id", "gen_random_uuid()"),
        ("payload", "''"),
        ("metadata", "''"),
        ("tell", "true"),
    ];
    let called = call("append_one", arguments, changes);
    format!("SELECT {called} FROM storied.number_names(ARRAY['order', 'order.placed']) AS n")
}

/// Like [`forged_one`], for `storied.append_known()`, with two events.
fn forged_known(changes: &[(&str, &str)]) -> String {
    let arguments = [
        ("server", SERVER),
        ("position", "3"),
        ("used", "n.numbers"),
        ("stream", "array_fill(storied.stream_number('order', 'a'), ARRAY[2])"),
        ("expected", "ARRAY[3, 4]::bigint[]"),
        ("category", "ARRAY[n.numbers[1], n.numbers[1]]"),
        ("name", "ARRAY[n.numbers[2], n.numbers[2]]"),
        ("event_id", "ARRAY[gen_random_uuid(), gen_random_uuid()]"),
        ("command_id", "ARRAY[gen_random_uuid(), gen_random_uuid()]"),
        ("payload", "ARRAY['', '']::bytea[]"),
        ("metadata", "ARRAY['', '']::bytea[]"),
    ];
    let called = call("append_known", arguments, changes);
    format!("SELECT {called} FROM storied.number_names(ARRAY['order', 'order.placed']) AS n")
}

fn call<const N: usize>(function: &str, arguments: [(&str, &str); N], changes: &[(&str, &str)]) -> String {
    for (change, _) in changes {
        assert!(arguments.iter().any(|(name, _)| name == change), "{change}");
    }
    let value =
        |(name, value)| changes.iter().find(|(change, _)| *change == name).map_or(value, |(_, to)| *to);
    format!("storied.{function}({})", arguments.map(value).join(", "))
}

/// Returns calls with tags that do not fit to the events, or with a condition that is not complete.
fn forged_tags() -> Vec<String> {
    let known = |event: &str, text: &str| {
        let last = format!("ARRAY['', '']::bytea[], NULL, {event}, {text}");
        forged_known(&[("metadata", &last)]).replace("append_known(", "append_known_tagged(")
    };
    let many = |event: &str, text: &str| {
        let last = format!("ARRAY['', '']::bytea[], false, NULL, {event}, {text}");
        forged(&[("metadata", &last)]).replace("append(", "append_tagged(")
    };
    let one = |text: &str| {
        forged_one(&[("tell", &format!("true, NULL, {text}"))]).replace("append_one(", "append_one_tagged(")
    };
    let unless = |item: &str, mark: &str, seen: &str| {
        let none = "'{}'::integer[], '{}'::text[]";
        many("'{}'::integer[]", "'{}'::text[]")
            .replace("append_tagged(", "append_unless(")
            .replace(") AS a", &format!(", {item}, {none}, {none}, {mark}, {seen}, false) AS a"))
    };
    let too_many = "ARRAY(SELECT 'a:' || n FROM generate_series(1, 65) AS n)";
    let mut calls = vec![
        one("ARRAY['a:1', 'a:1']"),
        one("ARRAY['a:1', NULL]"),
        one(too_many),
        known("array_fill(1, ARRAY[65])", too_many),
        many("array_fill(1, ARRAY[65])", too_many),
        unless("NULL", "0", "'{}'::bigint[]"),
        unless("ARRAY['a:1']", "NULL", "'{}'::bigint[]"),
        unless("ARRAY['a:1']", "0", "NULL"),
    ];
    for (event, text) in [
        ("ARRAY[3]", "ARRAY['a:1']"),
        ("ARRAY[0]", "ARRAY['a:1']"),
        ("ARRAY[1, NULL]", "ARRAY['a:1', 'a:2']"),
        ("ARRAY[1]", "ARRAY['a:1', 'a:2']"),
        ("ARRAY[1, 2]", "ARRAY['a:1']"),
        ("NULL", "ARRAY['a:1']"),
        ("ARRAY[1]", "NULL"),
        ("ARRAY[1]", "ARRAY[NULL]::text[]"),
        ("ARRAY[1, 1]", "ARRAY['a:1', 'a:1']"),
    ] {
        calls.extend([known(event, text), many(event, text)]);
    }
    calls
}

/// Whatever a program's login tries, the log keeps the appended events, every reader can read it,
/// and every node can start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_with_the_documented_rights_can_append_and_nothing_else() {
    let server = PostgresServer::start().await;
    let url = granted(&server).await;
    let store = as_program(&url).connect().await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(3)).await.unwrap();
    store.acquire_lease("l", uuid::Uuid::now_v7(), std::time::Duration::from_secs(60)).await.unwrap();
    let before = whole_log(&store).await;
    let mut attacker = connect(&as_user(&url, "shop")).await;

    // With the setting that the functions use, and with own objects first in the search_path.
    attacker
        .execute(
            "SET storied_log.appending = 'on';
             CREATE FUNCTION pg_temp.nextval(regclass) RETURNS bigint LANGUAGE sql AS 'SELECT 9::bigint';
             CREATE FUNCTION pg_temp.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT now()';
             CREATE FUNCTION pg_temp.is_name(text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
             CREATE FUNCTION pg_temp.equal(bigint, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT true';
             CREATE OPERATOR pg_temp.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = pg_temp.equal);
             CREATE TEMP TABLE events (position bigint, version bigint, stream bigint, category integer);
             CREATE TEMP TABLE streams (number bigint, category integer, stream_id text);
             CREATE TEMP TABLE names (number integer, name text);
             CREATE TEMP TABLE pg_locks (locktype text, objsubid int, classid oid, objid oid, database oid, pid int);
             CREATE TEMP SEQUENCE positions;
             SET search_path = pg_temp, pg_catalog, storied",
        )
        .await
        .unwrap();
    let denied = [
        // The log, and the objects that its order depends on.
        "INSERT INTO storied.events SELECT 99, stream, 4, now(), name, category, id, id, payload, metadata FROM storied.events LIMIT 1",
        "UPDATE storied.events SET name = 1",
        "INSERT INTO storied.correlations VALUES (gen_random_uuid(), 1)",
        "DELETE FROM storied.correlations",
        "INSERT INTO storied.tags VALUES ('a:1', 1, 1)",
        "UPDATE storied.tags SET tag = 'a:1'",
        "DELETE FROM storied.tags",
        "TRUNCATE storied.tags",
        "LOCK TABLE storied.tags IN EXCLUSIVE MODE",
        "SELECT storied.tag_key('a:1')",
        "SELECT storied.lock_tags(ARRAY['a:1'])",
        "SELECT storied.add_tags(ARRAY[1], ARRAY['a:1'], ARRAY[1::bigint], ARRAY[1], NULL)",
        "INSERT INTO storied.names VALUES (1, 'x')",
        "UPDATE storied.names SET name = 'x'",
        "DELETE FROM storied.names",
        "INSERT INTO storied.streams SELECT 1, category, 'x' FROM storied.streams",
        "UPDATE storied.streams SET stream_id = 'x'",
        "DELETE FROM storied.streams",
        "TRUNCATE storied.streams",
        "SELECT nextval('storied.stream_numbers')",
        "SELECT setval('storied.stream_numbers', 1)",
        "DELETE FROM storied.events",
        "TRUNCATE storied.events",
        "COPY storied.events FROM STDIN",
        "MERGE INTO storied.events AS e USING (VALUES (1)) AS v (n) ON e.position = v.n WHEN MATCHED THEN DELETE",
        "SELECT * FROM storied.events FOR UPDATE",
        "SELECT * FROM storied.events FOR KEY SHARE",
        "LOCK TABLE storied.events IN EXCLUSIVE MODE",
        "LOCK TABLE storied.events IN ROW EXCLUSIVE MODE",
        "ALTER TABLE storied.events DISABLE TRIGGER ALL",
        "ALTER TABLE storied.events ADD CHECK (false) NOT VALID",
        "DROP TABLE storied.events",
        "CREATE INDEX ON storied.events (name)",
        "CREATE TRIGGER t BEFORE INSERT ON storied.events EXECUTE FUNCTION storied.refuse_change()",
        "CREATE RULE r AS ON INSERT TO storied.events DO INSTEAD NOTHING",
        "CREATE POLICY p ON storied.events USING (false)",
        "CREATE STATISTICS storied.s ON stream, version FROM storied.events",
        "SET session_replication_role = replica",
        "SET allow_system_table_mods = on",
        "UPDATE pg_class SET reltuples = 0 WHERE relname = 'events'",
        "SELECT setval('storied.positions', 4611686018427387904)",
        "SELECT nextval('storied.positions')",
        "ALTER SEQUENCE storied.positions RESTART 1",
        "ALTER SEQUENCE storied.positions CACHE 32",
        "DROP SEQUENCE storied.positions",
        // The tables that nodes read at the start.
        "UPDATE storied.meta SET value = 'json' WHERE key = 'codec'",
        "INSERT INTO storied.meta VALUES ('x', 'y')",
        "DELETE FROM storied.meta",
        "TRUNCATE storied.meta",
        "DELETE FROM storied.migrations",
        "UPDATE storied.migrations SET checksum = ''",
        "INSERT INTO storied.migrations SELECT 999, 'later', now(), true, checksum, 0 FROM storied.migrations LIMIT 1",
        "DELETE FROM storied.read_model_migrations",
        "UPDATE storied.read_model_migrations SET checksum = ''",
        "DROP SCHEMA storied CASCADE",
        "ALTER SCHEMA storied RENAME TO stolen",
        "CREATE TABLE storied.mine (n int)",
        "CREATE FUNCTION storied.high_water_mark(int) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "REASSIGN OWNED BY storied TO shop",
        // The functions.
        "CREATE OR REPLACE FUNCTION storied.high_water_mark(OUT last_value bigint, OUT low_water bigint, OUT head bigint) LANGUAGE sql AS 'SELECT 1::bigint, 1::bigint, 1::bigint'",
        "ALTER FUNCTION storied.append_one RESET ALL",
        "ALTER FUNCTION storied.append SECURITY INVOKER",
        "DROP FUNCTION storied.high_water_mark",
        "SELECT storied.is_name('x')",
        "SELECT storied.is_stream_id('y')",
        // Epochs and records never decrease by it.
        "TRUNCATE storied.leases",
        "DELETE FROM storied.leases",
        "DELETE FROM storied.checkpoints",
        "DELETE FROM storied.projections",
        "DELETE FROM storied.controls",
        "DELETE FROM storied.publisher",
        "DELETE FROM storied.snapshots",
        "UPDATE storied.commands SET outcome = ''",
        "TRUNCATE storied.commands",
        "TRUNCATE storied.timers",
        "TRUNCATE storied.scheduled_commands",
        "TRUNCATE storied.schedules",
        // Settings of other sessions, and other logins.
        "ALTER ROLE storied SET synchronous_commit = off",
        "ALTER DATABASE postgres SET synchronous_commit = off",
        "ALTER SYSTEM SET fsync = off",
        "SET ROLE storied",
        "SET SESSION AUTHORIZATION storied",
        "SET LOCAL synchronous_commit = off; SELECT storied.append_one(0, 1, 1, NULL, 1, 1, 1, gen_random_uuid(), gen_random_uuid(), '', '', true)",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; SELECT storied.append_one(0, 1, 1, NULL, 1, 1, 1, gen_random_uuid(), gen_random_uuid(), '', '', true)",
    ];
    let long = "repeat('x', 401)";
    let a = "storied.stream_number('order', 'a')";
    let mut calls = vec![
        forged_one(&[("position", "NULL")]),
        forged_one(&[("position", "0")]),
        forged_one(&[("stream", "NULL")]),
        forged_one(&[("stream", "NULL"), ("position", "NULL"), ("expected", "0")]),
        forged_one(&[("stream", "NULL"), ("stream_id", "'new'"), ("expected", "0")]),
        forged_one(&[("stream", "NULL"), ("stream_id", "'new'")]),
        forged_one(&[("stream", "NULL"), ("position", "NULL"), ("stream_id", "''"), ("expected", "0")]),
        forged_one(&[
            ("stream", "NULL"),
            ("position", "NULL"),
            ("stream_id", "E'a\\x01'"),
            ("expected", "0"),
        ]),
        forged_one(&[
            ("stream", "NULL"),
            ("position", "NULL"),
            ("stream_id", "repeat('x', 401)"),
            ("expected", "0"),
        ]),
        forged_one(&[
            ("stream", "NULL"),
            ("position", "NULL"),
            ("stream_id", "'new'"),
            ("expected", "0"),
            ("category", "1"),
        ]),
        forged_one(&[
            ("stream", "NULL"),
            ("position", "NULL"),
            ("stream_id", "'new'"),
            ("expected", "0"),
            ("metadata", "NULL"),
        ]),
        forged_one(&[("expected", "0")]),
        forged_one(&[("expected", "-1")]),
        forged_one(&[("expected", "NULL")]),
        forged_one(&[("expected", "2")]),
        forged_one(&[("expected", "9223372036854775807")]),
        forged_one(&[("category", "NULL")]),
        forged_one(&[("category", "1")]),
        forged_one(&[("name", "NULL")]),
        forged_one(&[("name", "1")]),
        forged_one(&[("event_id", "NULL")]),
        forged_one(&[("command_id", "NULL")]),
        forged_one(&[("payload", "NULL")]),
        forged_one(&[("metadata", "NULL")]),
        forged_known(&[("position", "NULL")]),
        forged_known(&[("position", "0")]),
        forged_known(&[("used", "NULL")]),
        forged_known(&[("used", "ARRAY[1, 2]")]),
        forged_known(&[("used", "n.numbers || 1"), ("name", "ARRAY[n.numbers[2], 1]")]),
        forged_known(&[("stream", "NULL")]),
        forged_known(&[("stream", "ARRAY[NULL, NULL]::bigint[]")]),
        forged_known(&[("stream", "ARRAY[storied.stream_number('order', 'a')]")]),
        forged_known(&[("expected", "ARRAY[0, 1]::bigint[]")]),
        forged_known(&[("expected", "ARRAY[3]::bigint[]")]),
        forged_known(&[("expected", "ARRAY[3, NULL]::bigint[]")]),
        forged_known(&[("category", "ARRAY[n.numbers[1], 1]")]),
        forged_known(&[("category", "ARRAY[n.numbers[1]]")]),
        forged_known(&[("name", "ARRAY[n.numbers[2], NULL]")]),
        forged_known(&[("event_id", "ARRAY[gen_random_uuid()]")]),
        forged_known(&[("event_id", "array_fill(gen_random_uuid(), ARRAY[100000])")]),
        forged_known(&[("command_id", "ARRAY[gen_random_uuid()]")]),
        forged_known(&[("payload", "ARRAY['']::bytea[]")]),
        forged_known(&[("metadata", "ARRAY['', '', '']::bytea[]")]),
        forged(&[("stream", "NULL")]),
        forged(&[("stream", "ARRAY[NULL]::bigint[]")]),
        forged(&[("stream", "'[0:1]={NULL,NULL}'::bigint[]")]),
        // A stream that is known, but not by an event.
        forged(&[("stream", &format!("ARRAY[{a}, NULL]"))]),
        forged(&[("stream", &format!("ARRAY[{a}, NULL]")), ("position", "3")]),
        forged(&[("stream", &format!("ARRAY[{a}, NULL]")), ("expected", "ARRAY[3, 0]::bigint[]")]),
        forged(&[
            ("stream", &format!("ARRAY[{a}, NULL]")),
            ("expected", "ARRAY[-1, 0]::bigint[]"),
            ("position", "3"),
            ("look_up", "true"),
        ]),
        forged(&[("category", "ARRAY[n.numbers[1], 1]")]),
        forged(&[("category", "ARRAY[n.numbers[1], NULL]")]),
        forged(&[("category", "n.numbers")]),
        forged(&[("category", "n.numbers[1:1]")]),
        forged(&[("id", "ARRAY['x', 'y', 'z']")]),
        forged(&[("id", "'[0:1]={x,y}'::text[]")]),
        forged(&[("id", "ARRAY['x', NULL]")]),
        forged(&[("id", "NULL")]),
        forged(&[("expected", "ARRAY[9, NULL]::bigint[]")]),
        forged(&[("expected", "ARRAY[]::bigint[]")]),
        forged(&[("expected", "'[0:2]={5,0,0}'::bigint[]")]),
        // Counts that would leave holes in a stream, or take more events than given.
        forged(&[("events", "ARRAY[2, 1]")]),
        forged(&[("events", "ARRAY[2, 0]")]),
        forged(&[("events", "ARRAY[3, -1]")]),
        forged(&[("events", "ARRAY[1, NULL]")]),
        forged(&[("events", "ARRAY[2]")]),
        forged(&[("events", "NULL")]),
        forged(&[("events", "ARRAY[2147483647, 2147483647]")]),
        forged(&[("event_id", "ARRAY[gen_random_uuid(), NULL]")]),
        forged(&[("event_id", "ARRAY[gen_random_uuid()]")]),
        forged(&[("event_id", "array_fill(gen_random_uuid(), ARRAY[100000])")]),
        forged(&[("command_id", "ARRAY[gen_random_uuid()]")]),
        forged(&[("payload", "ARRAY['']::bytea[]")]),
        forged(&[("metadata", "ARRAY[NULL, NULL]::bytea[]")]),
        // Names without a number.
        forged(&[("used", "ARRAY[]::integer[]")]),
        forged(&[("used", "ARRAY[1, 2]")]),
        forged(&[("used", "n.numbers[2:3] || 1"), ("name", "ARRAY[n.numbers[3], 1]")]),
        forged(&[("used", "NULL")]),
        forged(&[("name", "ARRAY[n.numbers[3]]")]),
        forged(&[("name", "ARRAY[n.numbers[3], NULL]")]),
        forged(&[("name", "ARRAY[n.numbers[3], 1]")]),
    ];
    calls.extend(forged_tags());
    for name in [
        "",
        ".",
        "a..b",
        ".a",
        "a.",
        "a b",
        "a/b",
        "a\"b",
        "ä",
        "a\nb",
        "a\n",
        "*",
        ">",
        "NULL",
        "repeat('x', 201)",
        "'order.placed' || chr(10)",
        "chr(1)",
    ] {
        let name = if name.contains('(') || name == "NULL" { name.to_owned() } else { format!("'{name}'") };
        calls.push(format!("SELECT storied.number_names(ARRAY['order', {name}])"));
    }
    for id in ["''", long, "chr(1) || 'x'", "'a' || chr(10)", "chr(127)", "'a' || chr(133)"] {
        for (expected, look_up) in [("ARRAY[0, 0]::bigint[]", "false"), ("ARRAY[-1, -1]::bigint[]", "true")] {
            let id = format!("ARRAY['x', {id}]");
            calls.push(forged(&[("id", &id), ("expected", expected), ("look_up", look_up)]));
        }
    }
    let mut allowed = Vec::new();
    for sql in denied.iter().map(ToString::to_string).chain(calls) {
        match attempt(&mut attacker, &sql).await {
            Ok(()) => allowed.push(sql),
            // Not an attack: a syntax error, or a function or table that does not exist.
            Err(error) => {
                let code = error.as_database_error().unwrap().code().unwrap().into_owned();
                assert!(!["42601", "42883", "42P01", "42804", "22P02"].contains(&&*code), "{sql}: {error}");
            }
        }
    }
    assert!(allowed.is_empty(), "allowed: {allowed:#?}");
    // PostgreSQL answers this with a warning.
    attacker.execute("GRANT ALL ON storied.events TO shop").await.unwrap();
    let row =
        attacker.fetch_one("SELECT has_table_privilege('shop', 'storied.events', 'INSERT')").await.unwrap();
    assert!(!row.get::<bool, _>(0));
    // Rejected by a result instead of an error.
    for sql in [
        forged_known(&[("server", "0")]),
        forged_known(&[("position", "9223372036854775807")]),
        forged_known(&[("expected", "ARRAY[2, 3]::bigint[]")]),
        forged_known(&[("expected", "ARRAY[3, 3]::bigint[]")]),
        forged_one(&[("server", "0")]),
        forged_one(&[("server", "NULL")]),
        forged_one(&[("position", "9223372036854775807")]),
        forged_one(&[("stream", "NULL"), ("position", "NULL"), ("stream_id", "'a'"), ("expected", "0")]),
        forged(&[("server", "0")]),
        forged(&[("server", "NULL")]),
        // Versions that do not follow the last one.
        forged(&[("id", "ARRAY['a', 'x']"), ("expected", "ARRAY[2, 7]::bigint[]")]),
        forged(&[("id", "ARRAY['a', 'x']"), ("expected", "ARRAY[4, 7]::bigint[]")]),
        forged(&[("id", "ARRAY['a', 'a']"), ("expected", "ARRAY[0, 0]::bigint[]")]),
        forged(&[("expected", "ARRAY[9223372036854775807, -9223372036854775808]::bigint[]")]),
    ] {
        _ = attempt(&mut attacker, &sql).await;
        assert_eq!(whole_log(&store).await.len(), before.len(), "{sql}");
    }
    assert_eq!(format!("{:?}", whole_log(&store).await), format!("{before:?}"));
    let tags: i64 = attacker.fetch_one("SELECT count(*) FROM storied.tags").await.unwrap().get(0);
    assert_eq!(tags, 0);

    // A program is trusted with what it has seen. If it lies, it spoils a stream that it could fill
    // with garbage as well; no other stream, and no reader of the log.
    append(&store, &stream("spoilt"), ExpectedVersion::NoStream, events(1)).await.unwrap();
    let spoilt = "storied.stream_number('order', 'spoilt')";
    attempt(&mut attacker, &forged_one(&[("stream", spoilt), ("expected", "6")])).await.unwrap();
    attempt(&mut attacker, &forged_one(&[("stream", "42"), ("expected", "6")])).await.unwrap();
    let log = whole_log(&store).await;
    let others: Vec<_> = log.iter().filter(|event| event.stream != stream("spoilt")).collect();
    assert_eq!(format!("{others:?}"), format!("{:?}", before.iter().collect::<Vec<_>>()));
    assert_eq!(log.len(), before.len() + 2, "an event without a stream is ignored");
    let sound = async |store: &PostgresStore| {
        let log = whole_log(store).await;
        assert_sound(&log.into_iter().filter(|event| event.stream != stream("spoilt")).collect::<Vec<_>>());
    };

    // A stream twice in one call: only one part takes effect, as a whole.
    _ = attempt(&mut attacker, &forged(&[("id", "ARRAY['b', 'b']")])).await;
    // A correct call is not an attack.
    attempt(&mut attacker, &forged(&[])).await.unwrap();
    let x = "storied.stream_number('order', 'x')";
    attempt(&mut attacker, &forged_one(&[("stream", x), ("expected", "1")])).await.unwrap();
    sound(&store).await;

    // Everything that a node needs is unchanged.
    let again = as_program(&url).connect().await.unwrap();
    append(&again, &stream("a"), exact(3), events(1)).await.unwrap();
    PostgresStore::connect(&url).await.unwrap();
    sound(&again).await;
    assert_eq!(again.read_stream(&stream("x"), Version::NONE, 10).await.unwrap().len(), 2);
}

/// Readers can only read; a login for read models cannot even do that.
#[tokio::test]
async fn readers_and_read_models_have_less() {
    let url = granted(PostgresServer::shared().await).await;
    let store = as_program(&url).connect().await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(3)).await.unwrap();
    let reader =
        PostgresOptions::new().url(as_user(&url, "shop_reader")).migrate(false).connect().await.unwrap();
    assert_eq!(whole_log(&reader).await.len(), 3);
    assert_eq!(reader.read_stream(&stream("a"), Version::NONE, 10).await.unwrap().len(), 3);
    reader.leases().await.unwrap();
    assert!(reader.timers(None, None, 10).await.unwrap().is_empty());
    assert!(reader.due_timers("p", 10).await.unwrap().timers.is_empty());
    assert!(reader.scheduled_command(uuid::Uuid::nil()).await.unwrap().is_none());
    for schedule in [None, Some("s".into())] {
        let query = ScheduledQuery { state: None, schedule };
        assert!(reader.scheduled_commands(&query, None, 10).await.unwrap().is_empty());
    }
    assert!(reader.schedule("s").await.unwrap().is_none());
    assert!(reader.schedules(None, 10).await.unwrap().is_empty());
    assert!(reader.due_schedules(10).await.unwrap().schedules.is_empty());
    assert!(reader.read(Query::tagged("a", 1)).await.unwrap().0.is_empty());
    reader.stall().await.unwrap();
    let unless = Append::one(stream("a"), exact(3), events(1)).unless(Query::tagged("a", 1).exists());
    let error = reader.append(vec![unless]).await.remove(0).unwrap_err();
    assert!(matches!(error, AppendError::Store(StoreError::Storage { .. })), "{error:?}");
    let error = append(&reader, &stream("a"), exact(3), events(1)).await.unwrap_err();
    assert!(matches!(error, AppendError::Store(StoreError::Storage { .. })), "{error:?}");
    assert!(error.to_string().contains("docs/postgres-grants.sql"), "{error}");
    let timer = TimerRef { instance: "i".into(), name: String::new(), version: Version::new(1) };
    let command = NewScheduledCommand {
        id: uuid::Uuid::now_v7(),
        target: "order/a".into(),
        body: Vec::new(),
        due: DueTime::After(std::time::Duration::ZERO),
        schedule: None,
    };
    let schedule = StoredSchedule { name: "s".into(), definition: Vec::new(), revision: 1, next_at: None };
    for change in [
        reader.control("p", ControlChange::Pause).await.map(drop),
        reader.acquire_lease("l", uuid::Uuid::now_v7(), std::time::Duration::from_secs(1)).await.map(drop),
        reader.write_timers("p", Vec::new(), vec![timer]).await,
        reader.schedule_commands(vec![command.clone()]).await.map(drop),
        reader.start_due_commands(1).await.map(drop),
        reader
            .end_commands(vec![ScheduledEnd { id: command.id, outcome: ScheduledOutcome::Executed }], None)
            .await,
        reader.cancel_command(command.id).await.map(drop),
        reader.retry_command(command.id).await.map(drop),
        reader.write_schedule(schedule, Vec::new()).await.map(drop),
        reader.remove_schedule("s", 1).await.map(drop),
    ] {
        assert!(matches!(change, Err(StoreError::Storage { .. })), "{change:?}");
    }
    let mut view = connect(&as_user(&url, "shop_view")).await;
    for sql in [
        "TABLE storied.events",
        "TABLE storied.meta",
        "TABLE storied.leases",
        "SELECT storied.high_water_mark()",
    ] {
        let error = view.execute(sql).await.unwrap_err();
        assert!(error.to_string().contains("permission denied"), "{sql}: {error}");
    }
    let count = view.fetch_one("SELECT count(*) FROM storied.checkpoints").await.unwrap();
    assert_eq!(count.get::<i64, _>(0), 0);
}

/// Values that storied never writes: a program's login cannot store them. If they exist, a read is
/// an error and not a panic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_that_storied_never_writes_are_errors() {
    let url = granted(PostgresServer::shared().await).await;
    let store = as_program(&url).connect().await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(1)).await.unwrap();
    store.acquire_lease("l", uuid::Uuid::now_v7(), std::time::Duration::from_secs(60)).await.unwrap();
    let model = PostgresReadModel::new(PgPool::connect(&url).await.unwrap());
    let mut owner = connect(&url).await;
    let rows = "INSERT INTO storied.checkpoints VALUES ('p', 0, 0, 1, 1, 1, 1, gen_random_uuid());
        INSERT INTO storied.projections VALUES ('p', 1, 1, 1, 1, 1, gen_random_uuid());
        INSERT INTO storied.requests VALUES ('p', 'retry', 1, gen_random_uuid(), now());
        INSERT INTO storied.controls VALUES ('p', false, 1, 1, 1);
        INSERT INTO storied.publisher VALUES (1, 1, 1, 1);
        INSERT INTO storied.parked VALUES ('p', 0, 0, 1, gen_random_uuid(), 'order', 'a', 1, 'order.placed', 'e', 1, now());
        INSERT INTO storied.commands VALUES ('00000000-0000-0000-0000-000000000001', 'n', gen_random_uuid(), '');
        INSERT INTO storied.snapshots VALUES ('order', 'a', 1, 1, '');
        INSERT INTO storied.timers VALUES ('p', 'i', '', 1, now());
        INSERT INTO storied.scheduled_commands VALUES ('00000000-0000-0000-0000-000000000001', 'order/a', '', now(), NULL, 'waiting', NULL);
        INSERT INTO storied.schedules VALUES ('s', '', 1, now());
        ALTER TABLE storied.events DISABLE TRIGGER ALL";
    owner.execute(rows).await.unwrap();
    let mut program = connect(&as_user(&url, "shop")).await;
    let (never, negative) = (["'infinity'", "'-infinity'", "'294276-12-31'"].as_slice(), ["-1"].as_slice());
    let columns = [
        ("leases", "expires_at", never),
        ("leases", "epoch", negative),
        ("leases", "ttl", negative),
        ("checkpoints", "updated_at", never),
        ("checkpoints", "position", negative),
        ("checkpoints", "epoch", negative),
        ("checkpoints", "generation", negative),
        ("checkpoints", "delivered", negative),
        ("projections", "partitions", negative),
        ("projections", "live_version", negative),
        ("projections", "building_version", negative),
        ("projections", "start_position", negative),
        ("projections", "revision", negative),
        ("requests", "requested_at", never),
        ("requests", "position", negative),
        ("controls", "trigger_position", negative),
        ("controls", "triggers", negative),
        ("controls", "changes", negative),
        ("publisher", "position", negative),
        ("publisher", "epoch", negative),
        ("publisher", "sequence", negative),
        ("parked", "parked_at", never),
        ("parked", "stream_version", negative),
        ("parked", "attempts", negative),
        ("commands", "recorded_at", never),
        ("snapshots", "version", negative),
        ("snapshots", "revision", negative),
        ("timers", "due_at", never),
        ("scheduled_commands", "due_at", never),
        ("scheduled_commands", "state", &["'lost'"]),
        ("schedules", "revision", negative),
        ("schedules", "next_at", never),
        ("events", "recorded_at", never),
        ("events", "position", negative),
    ];
    // The indexes by due time have no row with such a version or target.
    assert!(attempt(&mut program, "UPDATE storied.timers SET version = -1").await.is_err());
    assert!(attempt(&mut program, "UPDATE storied.scheduled_commands SET target = ''").await.is_err());
    let command = uuid::Uuid::from_u128(1);
    for (table, column, values) in columns {
        if table != "events" {
            for value in values {
                let set = format!("UPDATE storied.{table} SET {column} = {value}");
                assert!(attempt(&mut program, &set).await.is_err(), "{set}");
            }
            let check = format!("ALTER TABLE storied.{table} DROP CONSTRAINT {table}_{column}_check");
            owner.execute(AssertSqlSafe(check)).await.unwrap();
        }
        for value in values {
            let set = format!("UPDATE storied.{table} SET {column} = {value}");
            owner.execute(AssertSqlSafe(set.clone())).await.unwrap();
            let read = match table {
                "leases" => store.leases().await.map(drop),
                "checkpoints" | "projections" => model.records().await.map(drop),
                "requests" => model.requests("p", Request::CancelRebuild, 9).await.map(drop),
                "controls" => store.controls().await.map(drop),
                "publisher" => store.publisher_checkpoint().await.map(drop),
                "parked" => store.parked(&CheckpointKey::new("p"), Position::START, 9).await.map(drop),
                "commands" => store.command(command).await.map(drop),
                "snapshots" => store.snapshot(&stream("a")).await.map(drop),
                "timers" => store.timers(None, None, 9).await.and(store.due_timers("p", 9).await).map(drop),
                "scheduled_commands" => {
                    let query = ScheduledQuery::default();
                    let listed = store.scheduled_commands(&query, None, 9).await.map(drop);
                    listed.and(store.scheduled_command(command).await.map(drop))
                }
                "schedules" => {
                    store.schedules(None, 9).await.map(drop).and(store.schedule("s").await.map(drop))
                }
                _ => store.read_stream(&stream("a"), Version::NONE, 9).await.map(drop),
            };
            let StoreError::Corrupt { reason } = read.expect_err(&set) else { panic!("{set}") };
            assert!(reason.contains(&format!("{table}.{column}")), "{reason}");
            let good = match column {
                "state" => "'waiting'",
                _ if column.ends_with("_at") => "now()",
                _ => "1",
            };
            let reset = format!("UPDATE storied.{table} SET {column} = {good}");
            owner.execute(AssertSqlSafe(reset)).await.unwrap();
        }
    }
    store.leases().await.unwrap();
    assert_sound(&whole_log(&store).await);
}
