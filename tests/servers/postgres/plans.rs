//! Each statement uses the index that it is written for, whatever the statistics say.
//!
//! PostgreSQL reports every plan, also of the statements within functions, while the statistics are
//! wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, Executor};
use storied::event::{Category, Tags};
use storied::store::{
    Append, AppendError, Checkpoint, CheckpointKey, CommandRecord, DueTime, NewScheduledCommand, NewTimer,
    ParkedEvent, ProgressWrite, Query, QueryStore, ScheduleStore, ScheduledCommand, ScheduledEnd,
    ScheduledOutcome, ScheduledQuery, ScheduledState, Snapshot, StoredSchedule, StreamAppend, TimerRef,
};
use storied::{
    Event, EventName, EventStore, ExpectedVersion, Filter, Position, PostgresOptions, PostgresStore, ReadLog,
    Version,
};
use uuid::Uuid;

use crate::postgres::tools::{append, connect, events, eventually, exact, run, stream};
use crate::support::PostgresServer;

const STATEMENTS: [&str; 3] = [
    include_str!("../../../src/store/postgres/statements.rs"),
    include_str!("../../../src/store/sql/progress.rs"),
    include_str!("../../../src/store/sql/control.rs"),
];

/// Tables that grow with the log. The others have a row for each projection or lease.
const LARGE: [&str; 10] = [
    "events",
    "streams",
    "correlations",
    "tags",
    "commands",
    "snapshots",
    "parked",
    "timers",
    "scheduled_commands",
    "schedules",
];

/// The worst possible statistics.
const LIES: [(&str, &str); 7] = [
    ("the tables are empty", "VACUUM (ANALYZE) storied.events, storied.streams, storied.correlations, storied.tags, storied.commands, storied.snapshots, storied.parked, storied.timers, storied.scheduled_commands, storied.schedules"),
    ("nothing is known", "SELECT 1"),
    (
        "no rows on many pages",
        "UPDATE pg_class SET relpages = 100, reltuples = 0 WHERE relnamespace = 'storied'::regnamespace",
    ),
    (
        "one row on a billion pages",
        "UPDATE pg_class SET relpages = 1000000000, reltuples = 1 WHERE relnamespace = 'storied'::regnamespace",
    ),
    (
        "a billion rows on one page",
        "UPDATE pg_class SET relpages = 1, reltuples = 1e9 WHERE relnamespace = 'storied'::regnamespace",
    ),
    (
        "indexes larger than the tables",
        "UPDATE pg_class SET relpages = 1, reltuples = 1 WHERE relnamespace = 'storied'::regnamespace AND relkind = 'r';
         UPDATE pg_class SET relpages = 1000000000, reltuples = 1e9 WHERE relnamespace = 'storied'::regnamespace AND relkind = 'i'",
    ),
    (
        "every value is the same",
        "ANALYZE storied.events, storied.streams, storied.correlations, storied.tags, storied.commands, storied.snapshots, storied.parked, storied.timers, storied.scheduled_commands, storied.schedules;
         UPDATE pg_statistic SET stadistinct = 1, stakind1 = 0, stakind2 = 0, stakind3 = 0, stakind4 = 0, stakind5 = 0
         WHERE starelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'storied'::regnamespace)",
    ),
];

/// The ways in which a store connects.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Own,
    Borrowed,
    Pooler,
}

/// Starts a server that logs every plan.
async fn server() -> PostgresServer {
    PostgresServer::start_with(&[
        "autovacuum=off",
        "session_preload_libraries=auto_explain",
        "auto_explain.log_nested_statements=on",
        "auto_explain.log_min_duration=-1",
        "max_connections=200",
    ])
    .await
}

/// Makes the store run each of its statements on tables.
async fn use_everything(url: &str, store: &PostgresStore, way: Way, many_first: bool) {
    let name = |name: &str| EventName::new(name).unwrap();
    // The first statements are planned while the table is empty.
    if many_first {
        append(store, &stream("first"), ExpectedVersion::Any, events(3)).await.unwrap();
        append(store, &stream("first"), exact(3), events(2)).await.unwrap();
    }
    append(store, &stream("a"), ExpectedVersion::NoStream, events(1)).await.unwrap();
    append(store, &stream("a"), exact(1), events(1)).await.unwrap();
    append(store, &stream("a"), exact(0), events(2)).await.unwrap_err();
    append(store, &stream("a"), ExpectedVersion::Any, events(3)).await.unwrap();
    // Events of nested commands, by each of the functions.
    let cause = Uuid::now_v7();
    let nested = |count| {
        let mut nested = events(count);
        nested.iter_mut().for_each(|event| event.correlation_id = Some(cause));
        nested
    };
    append(store, &stream("n"), ExpectedVersion::NoStream, nested(1)).await.unwrap();
    append(store, &stream("n"), exact(1), nested(1)).await.unwrap();
    append(store, &stream("n"), exact(2), nested(2)).await.unwrap();
    append(store, &stream("n"), ExpectedVersion::Any, nested(2)).await.unwrap();
    let part = |id, expected| StreamAppend { stream: stream(id), expected, events: events(2) };
    let two =
        Append::all(vec![part("a", ExpectedVersion::StreamExists), part("b", ExpectedVersion::NoStream)]);
    store.append(vec![two]).await.remove(0).unwrap();
    // An append without an answer is looked up.
    if way == Way::Own {
        let mut lock = connect(url).await;
        sqlx::query("BEGIN").execute(&mut lock).await.unwrap();
        sqlx::query("LOCK storied.events IN SHARE MODE").execute(&mut lock).await.unwrap();
        let appending = {
            let store = store.clone();
            tokio::spawn(async move { append(&store, &stream("c"), exact(0), events(2)).await })
        };
        let mut killer = connect(url).await;
        eventually("an append that waits", async || {
            let killed =
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'
                AND query LIKE '%append%' AND datname = current_database() AND pid <> pg_backend_pid()";
            sqlx::query(killed).fetch_optional(&mut killer).await.unwrap().is_some()
        })
        .await;
        sqlx::query("ROLLBACK").execute(&mut lock).await.unwrap();
        appending.await.unwrap().unwrap();
    }

    let head = store.high_water_mark().await.unwrap();
    let recorded = store.read_stream(&stream("a"), Version::NONE, 10).await.unwrap().remove(0);
    assert_eq!(store.event_id_at(recorded.position).await.unwrap(), Some(recorded.id));
    let everything = ReadLog::after(Position::START);
    store.read_log(everything.clone()).await.unwrap();
    store.read_log(ReadLog::after(head)).await.unwrap();
    let before_the_end = Position::new(head.get() - 1);
    for filter in [
        Filter::all().with_names([name("order.placed")]),
        Filter::all().with_names([name("order.never")]),
        Filter::all().with_names([name("order.placed")]).with_streams([stream("a")]),
        Filter::all().with_streams([stream("a"), stream("nothing")]),
        Filter::all().with_streams([stream("nothing")]),
        Filter::all().with_categories([Category::new("order").unwrap()]),
        Filter::all().with_categories([Category::new("nothing").unwrap()]),
        Filter::all().with_streams((0..70).map(stream)),
    ] {
        for _ in 0..7 {
            store.read_log(everything.clone().filter(filter.clone())).await.unwrap();
        }
        store.read_log(everything.clone().filter(filter.clone()).upto(before_the_end)).await.unwrap();
    }

    store.command_events(&recorded.stream, recorded.command_id).await.unwrap().unwrap();
    assert_eq!(store.command_events(&recorded.stream, Uuid::now_v7()).await.unwrap(), None);
    for (id, count) in [(recorded.command_id, 1), (cause, 6), (Uuid::now_v7(), 0)] {
        assert_eq!(store.correlated(id, Position::START, 10).await.unwrap().len(), count);
    }

    let snapshot = Snapshot { version: Version::new(1), revision: 1, state: Bytes::from_static(b"x") };
    store.save_snapshot(&stream("a"), snapshot).await.unwrap();
    store.snapshot(&stream("a")).await.unwrap();
    let record = CommandRecord {
        id: Uuid::now_v7(),
        name: "x".into(),
        fingerprint: Uuid::now_v7(),
        outcome: Bytes::new(),
        recorded_at: recorded.recorded_at,
    };
    store.record_command(record.clone()).await.unwrap();
    store.record_command(record.clone()).await.unwrap();
    store.command(record.id).await.unwrap();
    store.forget_commands(Duration::ZERO, 10).await.unwrap();
    let (from, to) = (Checkpoint::default(), Checkpoint { position: head, ..Checkpoint::default() });
    let parked = ParkedEvent::new(&recorded, "no".into(), 1);
    let key = || CheckpointKey::new("p");
    let writes = vec![
        ProgressWrite::Checkpoint { key: key(), from, to },
        ProgressWrite::Park { key: key(), event: parked },
    ];
    store.write_progress(writes).await.unwrap();
    store.parked(&key(), Position::START, 10).await.unwrap();
    let unpark = ProgressWrite::Unpark { key: key(), position: recorded.position };
    store.write_progress(vec![unpark]).await.unwrap();

    use_tags(store).await;
    use_timers(store).await;
    use_schedules(store).await;

    // Only projections run these statements, in the database of a read model.
    let mut connection = connect(url).await;
    connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off").await.unwrap();
    let statements = statements();
    let sql = |name| AssertSqlSafe(statements[name].clone());
    sqlx::query(sql("records")).fetch_all(&mut connection).await.unwrap();
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Ordered {
    Placed,
}

impl Event for Ordered {
    const CATEGORY: &'static str = "order";
}

/// Makes the store run each of its statements on tags.
async fn use_tags(store: &PostgresStore) {
    let tagged = |count| {
        let mut tagged = events(count);
        tagged.iter_mut().for_each(|event| event.tags = Tags::new().tag("a", 1).tag("b", 2).tag("c", 3));
        tagged
    };
    // By each of the functions.
    append(store, &stream("t"), ExpectedVersion::NoStream, tagged(1)).await.unwrap();
    append(store, &stream("t"), exact(1), tagged(1)).await.unwrap();
    append(store, &stream("t"), exact(2), tagged(2)).await.unwrap();
    append(store, &stream("t"), ExpectedVersion::Any, tagged(100)).await.unwrap();
    append(store, &stream("t"), exact(0), tagged(2)).await.unwrap_err();
    let placed = || Query::variants::<Ordered>(["placed"]);
    let nothing = Query::tagged("b", 2).tag("d", 4);
    let query = Query::any([placed().tag("a", 1).tag("c", 3), Query::tagged("b", 2), nothing.clone()]);
    let unless = |boundary| Append::one(stream("t"), ExpectedVersion::Any, tagged(2)).unless(boundary);
    let (_, first) = store.read(query.clone()).await.unwrap();
    for turn in 0..7 {
        let (read, boundary) = store.read(query.clone()).await.unwrap();
        assert_eq!(read.len(), 104 + 2 * turn);
        store.append(vec![unless(boundary)]).await.remove(0).unwrap();
    }
    let crossed = store.append(vec![unless(first)]).await.remove(0).unwrap_err();
    assert!(matches!(crossed, AppendError::Changed { .. }), "{crossed:?}");
    let exists = store.append(vec![unless(placed().tag("b", 2).exists())]).await.remove(0).unwrap_err();
    assert!(matches!(exists, AppendError::Exists { .. }), "{exists:?}");
    assert!(store.read(nothing).await.unwrap().0.is_empty());
}

/// Makes the store run each of its statements on timers.
async fn use_timers(store: &PostgresStore) {
    let timer = |n: usize| NewTimer {
        instance: format!("i{}", n / 3),
        name: format!("{}", n % 3),
        version: Version::new(1),
        due: DueTime::After(Duration::from_secs(n as u64 % 2 * 3_600)),
    };
    let removed =
        |n: usize| TimerRef { instance: format!("i{n}"), name: "0".into(), version: Version::new(1) };
    for process in ["p", "q", "r"] {
        store.write_timers(process, (0..300).map(timer).collect(), Vec::new()).await.unwrap();
        for _ in 0..7 {
            store.write_timers(process, vec![timer(0)], vec![removed(1)]).await.unwrap();
            assert_eq!(store.due_timers(process, 10).await.unwrap().timers.len(), 10);
            let page = store.timers(Some(process), None, 10).await.unwrap();
            store.timers(Some(process), page.last(), 10).await.unwrap();
            store.timers(None, page.last(), 10).await.unwrap();
        }
    }
    store.write_timers("p", Vec::new(), (0..100).map(removed).collect()).await.unwrap();
}

/// Makes the store run each of its statements on scheduled commands and schedules.
async fn use_schedules(store: &PostgresStore) {
    let command = |n: u128| NewScheduledCommand {
        id: Uuid::from_u128(n),
        target: "order/a".into(),
        body: b"x".to_vec(),
        due: DueTime::After(Duration::from_secs(n as u64 % 2 * 3_600)),
        schedule: n.is_multiple_of(3).then(|| "s".into()),
    };
    let schedule = |name: &str, revision| StoredSchedule {
        name: name.into(),
        definition: Vec::new(),
        revision,
        next_at: (name == "s").then(Utc::now),
    };
    store.schedule_commands((0..300).map(command).collect()).await.unwrap();
    for name in ["r", "s", "t"] {
        assert!(store.write_schedule(schedule(name, 1), Vec::new()).await.unwrap());
    }
    for turn in 0..7 {
        let id = Uuid::from_u128(turn);
        store.schedule_commands(vec![command(turn), command(1_000 + turn)]).await.unwrap();
        let started = store.start_due_commands(8).await.unwrap().commands;
        assert_eq!(started.len(), 8);
        let end = |(n, it): (usize, &ScheduledCommand)| ScheduledEnd {
            id: it.id,
            outcome: match n % 3 {
                0 => ScheduledOutcome::Parked("no".into()),
                1 => ScheduledOutcome::Executed,
                _ => ScheduledOutcome::Postponed(Duration::from_secs(5)),
            },
        };
        store.end_commands(started.iter().enumerate().map(end).collect(), None).await.unwrap();
        store.retry_command(started[0].id).await.unwrap().unwrap();
        store.cancel_command(started[0].id).await.unwrap().unwrap();
        store.scheduled_command(id).await.unwrap();
        for (state, name) in [(None, None), (None, Some("s")), (Some(ScheduledState::Waiting), Some("s"))] {
            let query = ScheduledQuery { state, schedule: name.map(Into::into) };
            let page = store.scheduled_commands(&query, None, 10).await.unwrap();
            assert_eq!(page.len(), 10);
            store.scheduled_commands(&query, page.last(), 10).await.unwrap();
        }
        let revision = turn as u64 + 2;
        assert!(store.write_schedule(schedule("s", revision), vec![command(2_000 + turn)]).await.unwrap());
        assert_eq!(store.due_schedules(10).await.unwrap().schedules.len(), 1);
        store.schedule("r").await.unwrap().unwrap();
        assert_eq!(store.schedules(Some("r"), 10).await.unwrap().len(), 2);
    }
    assert!(!store.remove_schedule("s", 1).await.unwrap());
    assert!(store.remove_schedule("s", 8).await.unwrap());
}

/// Extracts the statement and the scans of every plan in a log.
fn plans(log: &str) -> Vec<(String, Vec<String>)> {
    let mut plans = Vec::new();
    for entry in log.split("  plan:\n").skip(1) {
        // The lines of an entry begin with a tab.
        let mut lines =
            entry.lines().take_while(|line| line.starts_with('\t')).map(str::trim_start).peekable();
        let mut query = String::new();
        while let Some(line) = lines.next_if(|line| !line.contains("(cost=")) {
            query += line.trim_start_matches("Query Text: ");
            query.push(' ');
        }
        let mut scans: Vec<String> = Vec::new();
        for line in lines {
            if line.contains("Scan") && line.contains("(cost=") {
                let scan = line.trim_start_matches("->").trim().split("  (cost=").next().unwrap();
                scans.push(scan.to_owned());
            } else if let (Some(cond), Some(scan)) = (line.strip_prefix("Index Cond: "), scans.last_mut()) {
                *scan += &format!(" by {cond}");
            }
        }
        plans.push((query.split_whitespace().collect::<Vec<_>>().join(" "), scans));
    }
    plans
}

/// Returns the fault of a scan: no index, or an index that is not used by its first column.
fn wrong(scan: &str) -> Option<&'static str> {
    let table = |table: &str| {
        let whole = |word: &str| word.trim_start_matches("storied.") == table;
        scan.split_whitespace().skip_while(|word| *word != "on").nth(1).is_some_and(whole)
    };
    if !LARGE.iter().any(|large| table(large)) {
        return None;
    }
    let Some(index) = scan.split_whitespace().skip_while(|word| *word != "using").nth(1) else {
        return Some("no index");
    };
    let leads =
        |column: &str| scan.contains(&format!("({column} ")) || scan.contains(&format!("(ROW({column},"));
    let first = match index {
        "storied_events_position" => "\"position\"",
        "storied_events_version" => "stream",
        "events_by_name" => "name",
        "events_by_command_id" => "command_id",
        "correlations_pkey" => "correlation_id",
        "tags_pkey" => "tag",
        "streams_pkey" => "number",
        "streams_stream_id_category_key" => "stream_id",
        "commands_pkey" => "id",
        "commands_by_age" => "recorded_at",
        "snapshots_pkey" => "category",
        "parked_pkey" => "projection",
        "timers_pkey" => "process",
        "timers_by_due" => "(process)::text",
        "scheduled_commands_pkey" => "id",
        "scheduled_commands_by_due" => "state",
        "scheduled_commands_by_schedule" => "schedule",
        "schedules_pkey" => "name",
        "schedules_by_next" => "next_at",
        _ => return Some("an index that this test does not know"),
    };
    (!leads(first)).then_some("the index does not lead to the rows")
}

/// Whether a statement of this kind uses the intended index of the log.
fn meant(query: &str, scan: &str) -> bool {
    let by_name = query.contains("wanted.number, $1");
    if query.contains("(process COLLATE ucs_basic, due_at)") && scan.contains(" on timers") {
        return scan.contains("using timers_by_due ") && scan.contains("due_at");
    }
    let of_schedule = ["schedule = $6", "schedule = of_name"].iter().any(|key| query.contains(key));
    if of_schedule && scan.contains(" on scheduled_commands") {
        return scan.contains("using scheduled_commands_by_schedule ");
    }
    if !scan.contains(" on events") {
        return true;
    }
    let index = |name: &str| scan.contains(&format!("using {name} "));
    if by_name && scan.contains("(ROW(") {
        return index("events_by_name");
    }
    if query.contains(".correlations WHERE") && scan.contains("(ROW(") {
        return index("events_by_command_id");
    }
    // By the text of the statement, not by the choice of the planner.
    if ["streams[", "p.stream ", "i.stream ", "(SELECT"]
        .iter()
        .any(|key| query.contains(&format!("stream = {key}")))
    {
        return index("storied_events_version");
    }
    if query.contains("unnest(command_categories, command_stream_ids, command_ids)") {
        return index("events_by_command_id");
    }
    index("storied_events_position")
}

/// The statements of the store that read or change large tables, directly or by
/// calls.
fn statements() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for block in STATEMENTS.iter().flat_map(|text| text.split("statements! {").skip(1)) {
        for (at, _) in block.match_indices(": \"") {
            let name = block[..at].rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
            let sql = block[at + 3..].split("\",\n").next().unwrap();
            let sql = sql.split_whitespace().collect::<Vec<_>>().join(" ");
            if LARGE.iter().any(|table| sql.contains(&format!("storied.{table}"))) {
                found.insert(name.to_owned(), sql.replace("storied.", "\"storied\"."));
            }
        }
    }
    assert!(found.len() > 15, "{found:?}");
    found
}

/// Runs everything on a new database with wrong statistics; returns the plan of each statement.
async fn planned(
    server: &PostgresServer,
    way: Way,
    lie: &str,
    by_name: bool,
    settings: &str,
) -> Vec<(String, Vec<String>)> {
    let url = server.create_database().await;
    let database = url.rsplit('/').next().unwrap().to_owned();
    drop(PostgresOptions::new().url(&url).index_by_name(by_name).connect().await.unwrap());
    // Enough rows that the index of streams is a level higher than the primary key, which then
    // seems cheaper.
    let fill = async || {
        let store = PostgresStore::connect(&url).await.unwrap();
        append(&store, &stream("x"), ExpectedVersion::NoStream, events(300)).await.unwrap();
    };
    let emptied = lie.starts_with("VACUUM");
    if !emptied && lie != "SELECT 1" {
        fill().await;
    }
    for statement in lie.split(';') {
        run(&url, statement).await;
    }
    if emptied {
        fill().await;
    }
    for setting in settings.split(';').chain(["auto_explain.log_min_duration = 0"]) {
        run(&server.url(), &format!("ALTER DATABASE {database} SET {setting}")).await;
    }
    let start = server.log().len();
    let options = PostgresOptions::new().url(&url).max_connections(1);
    let options = match way {
        Way::Own => options.max_connections(3),
        Way::Pooler => options.transaction_pooler(true),
        Way::Borrowed => {
            let connect: PgConnectOptions = url.parse().unwrap();
            options.pool(PgPoolOptions::new().max_connections(2).connect_lazy_with(connect))
        }
    };
    let store = options.connect().await.unwrap();
    use_everything(&url, &store, way, !by_name).await;
    drop(store);
    plans(&server.log()[start..])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statistics_cannot_spoil_a_plan() {
    let server = server().await;
    let statements = statements();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut faults = BTreeSet::new();
    for (number, (what, lie)) in LIES.iter().enumerate() {
        let other = if number % 2 == 0 { Way::Borrowed } else { Way::Pooler };
        for (turn, way) in [Way::Own, other].into_iter().enumerate() {
            // Plans for any value, plans for the value, and costs that favour the wrong plan.
            let settings = match (number + turn) % 3 {
                0 => "plan_cache_mode = force_generic_plan",
                1 => "plan_cache_mode = force_custom_plan",
                _ => "plan_cache_mode = force_generic_plan; random_page_cost = 1000; seq_page_cost = 0",
            };
            let by_name = (number / 2 + turn) % 2 == 0;
            let found = planned(&server, way, lie, by_name, settings).await;
            for (query, scans) in &found {
                seen.extend(statements.iter().filter(|(_, sql)| *sql == query).map(|(name, _)| &**name));
                for scan in scans {
                    let fault = wrong(scan).or_else(|| (!meant(query, scan)).then_some("another index"));
                    if let Some(fault) = fault {
                        faults
                            .insert(format!("{what}, {way:?}, {settings}: {fault}: {scan}\n    in {query}"));
                    }
                }
            }
        }
    }
    let unseen: Vec<_> = statements.keys().filter(|name| !seen.contains(&***name)).collect();
    assert!(faults.is_empty(), "{}", faults.into_iter().collect::<Vec<_>>().join("\n"));
    assert_eq!(unseen, [""; 0], "statements without a logged plan");
}
