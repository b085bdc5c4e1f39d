-- The log and the state stored beside it. Never edit this file after its release: databases store
-- its checksum.

-- Identity of the store (store_id), encoding of the payloads (codec) and home of the store.
CREATE TABLE storied_meta (
    key   TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Event names and categories, numbered in the order of their first use.
CREATE TABLE storied_names (
    number INTEGER NOT NULL PRIMARY KEY,
    name   TEXT    NOT NULL UNIQUE
) STRICT;

-- Streams, numbered in the order of their creation. A stream is created together with its first
-- event.
CREATE TABLE storied_streams (
    number    INTEGER NOT NULL PRIMARY KEY,
    category  INTEGER NOT NULL REFERENCES storied_names,
    stream_id TEXT    NOT NULL,
    -- The id comes first, because it distinguishes streams sooner than the category.
    UNIQUE (stream_id, category)
) STRICT;

-- The log. storied_log shows it in clear.
CREATE TABLE storied_events (
    -- Without the limit, SQLite would choose random positions after the highest one.
    position    INTEGER NOT NULL PRIMARY KEY CHECK (position < 9223372036854775807), -- position in the log
    stream      INTEGER NOT NULL,             -- number in storied_streams
    version     INTEGER NOT NULL,             -- version in the stream: 1, 2, 3 …
    category    INTEGER NOT NULL,             -- number in storied_names, for filters
    name        INTEGER NOT NULL,             -- number in storied_names
    recorded_at INTEGER NOT NULL,             -- microseconds since 1970
    id          BLOB    NOT NULL,             -- UUID, 16 bytes
    command_id  BLOB    NOT NULL,             -- UUID, 16 bytes
    payload     BLOB    NOT NULL,             -- encoded with the codec of storied_meta
    metadata    BLOB    NOT NULL,             -- CBOR
    correlation_id BLOB,                      -- UUID, 16 bytes; NULL if it is the id of the command
    UNIQUE (stream, version)
) STRICT;

-- Finds the events of a command in a stream, for the life of the log. The versions of a stream have
-- the order of the positions, which end each entry.
CREATE INDEX storied_events_by_command ON storied_events (command_id, stream);

-- Finds the events of nested commands; the position ends each entry.
CREATE INDEX storied_events_by_correlation ON storied_events (correlation_id) WHERE correlation_id IS NOT NULL;

-- Tags of events, for queries. An event without tags has no rows.
CREATE TABLE storied_tags (
    tag      TEXT    NOT NULL,                -- key:value
    position INTEGER NOT NULL,                -- position of the event
    name     INTEGER NOT NULL,                -- name of the event: number in storied_names
    PRIMARY KEY (tag, position)
) STRICT, WITHOUT ROWID;

-- The log in clear, for tools and dumps.
CREATE VIEW storied_log AS
SELECT
    event.position,
    category.name AS category,
    stream.stream_id,
    event.version,
    name.name,
    lower(substr(hex(event.id), 1, 8) || '-' || substr(hex(event.id), 9, 4) || '-' || substr(hex(event.id), 13, 4) || '-'
        || substr(hex(event.id), 17, 4) || '-' || substr(hex(event.id), 21)) AS id,
    lower(substr(hex(event.command_id), 1, 8) || '-' || substr(hex(event.command_id), 9, 4) || '-' || substr(hex(event.command_id), 13, 4) || '-'
        || substr(hex(event.command_id), 17, 4) || '-' || substr(hex(event.command_id), 21)) AS command_id,
    strftime('%Y-%m-%dT%H:%M:%S', event.recorded_at / 1000000, 'unixepoch')
        || printf('.%06dZ', event.recorded_at % 1000000) AS recorded_at,
    event.payload,
    event.metadata
FROM storied_events AS event
LEFT JOIN storied_streams AS stream ON stream.number = event.stream
LEFT JOIN storied_names AS category ON category.number = stream.category
LEFT JOIN storied_names AS name ON name.number = event.name;

-- An INSERT of an event into this view fails unless the log contains the event. An append checks so
-- that the numbers that its process remembers are those of this log: a restored copy may have given
-- them to other streams.
CREATE VIEW storied_expected_events AS SELECT position, id FROM storied_events;

CREATE TRIGGER storied_expected_events_check INSTEAD OF INSERT ON storied_expected_events
WHEN NOT EXISTS (SELECT 1 FROM storied_events WHERE position = new.position AND id = new.id)
BEGIN
    SELECT RAISE(ABORT, 'the log does not contain the expected event');
END;

CREATE TRIGGER storied_events_no_update BEFORE UPDATE ON storied_events
BEGIN
    SELECT RAISE(ABORT, 'storied_events is append-only: write a new event instead of changing an old one');
END;

CREATE TRIGGER storied_events_no_delete BEFORE DELETE ON storied_events
BEGIN
    SELECT RAISE(ABORT, 'storied_events is append-only: followers rely on every event staying where it is');
END;

CREATE TRIGGER storied_streams_no_update BEFORE UPDATE ON storied_streams
BEGIN
    SELECT RAISE(ABORT, 'storied_streams is append-only: events refer to its numbers');
END;

CREATE TRIGGER storied_streams_no_delete BEFORE DELETE ON storied_streams
BEGIN
    SELECT RAISE(ABORT, 'storied_streams is append-only: events refer to its numbers');
END;

CREATE TRIGGER storied_names_no_update BEFORE UPDATE ON storied_names
BEGIN
    SELECT RAISE(ABORT, 'storied_names is append-only: events refer to its numbers');
END;

CREATE TRIGGER storied_names_no_delete BEFORE DELETE ON storied_names
BEGIN
    SELECT RAISE(ABORT, 'storied_names is append-only: events refer to its numbers');
END;

CREATE TRIGGER storied_tags_no_update BEFORE UPDATE ON storied_tags
BEGIN
    SELECT RAISE(ABORT, 'storied_tags is append-only: decisions rely on the tags of every event');
END;

CREATE TRIGGER storied_tags_no_delete BEFORE DELETE ON storied_tags
BEGIN
    SELECT RAISE(ABORT, 'storied_tags is append-only: decisions rely on the tags of every event');
END;

-- What operators control of projections, on every node.
CREATE TABLE storied_controls (
    projection       TEXT    NOT NULL PRIMARY KEY,
    paused           INTEGER NOT NULL,        -- 1: paused
    trigger_position INTEGER NOT NULL,        -- manual triggers apply up to here
    triggers         INTEGER NOT NULL,        -- number of manual triggers
    changes          INTEGER NOT NULL         -- owners read their state again after each change
) STRICT, WITHOUT ROWID;

-- The end of the log stream that the publisher confirmed last.
CREATE TABLE storied_publisher (
    id       INTEGER NOT NULL PRIMARY KEY CHECK (id = 1), -- one row
    position INTEGER NOT NULL,
    epoch    INTEGER NOT NULL,                -- fencing token of the publisher
    sequence INTEGER NOT NULL                 -- sequence number of the last message
) STRICT;

CREATE TABLE storied_leases (
    name       TEXT    NOT NULL PRIMARY KEY,
    owner      BLOB    NOT NULL,              -- UUID, 16 bytes
    epoch      INTEGER NOT NULL,              -- fencing token, grows with every new owner
    expires_at INTEGER NOT NULL,              -- microseconds since 1970; 0: released
    ttl        INTEGER NOT NULL               -- microseconds: the holder renews the lease within this time
) STRICT, WITHOUT ROWID;

CREATE TABLE storied_snapshots (
    category  TEXT    NOT NULL,
    stream_id TEXT    NOT NULL,
    version   INTEGER NOT NULL,               -- last event folded into the state
    revision  INTEGER NOT NULL,               -- schema revision of the state
    state     BLOB    NOT NULL,
    PRIMARY KEY (category, stream_id)
) STRICT;

-- Records of commands without events in a stream, until they are deleted.
CREATE TABLE storied_commands (
    id          BLOB    NOT NULL PRIMARY KEY, -- UUID, 16 bytes
    name        TEXT    NOT NULL,
    fingerprint BLOB    NOT NULL,             -- UUID, 16 bytes: fingerprint of the command's content
    outcome     BLOB    NOT NULL,             -- CBOR
    recorded_at INTEGER NOT NULL              -- microseconds since 1970
) STRICT, WITHOUT ROWID;

CREATE INDEX storied_commands_by_age ON storied_commands (recorded_at);

-- Timers: wake-ups of the instances of processes.
CREATE TABLE storied_timers (
    process  TEXT    NOT NULL,
    instance TEXT    NOT NULL,
    name     TEXT    NOT NULL,                -- empty: the resumption of the instance itself
    version  INTEGER NOT NULL,                -- a lower version never replaces a higher one
    due_at   INTEGER NOT NULL,                -- microseconds since 1970
    PRIMARY KEY (process, instance, name)
) STRICT, WITHOUT ROWID;

CREATE INDEX storied_timers_by_due ON storied_timers (process, due_at, instance, name);

-- Scheduled commands: commands that are executed when they are due.
CREATE TABLE storied_scheduled_commands (
    id       BLOB    NOT NULL PRIMARY KEY,    -- UUID, 16 bytes: id of the command
    target   TEXT    NOT NULL,                -- in clear: category/id, or the name of a handler
    due_at   INTEGER NOT NULL,                -- microseconds since 1970
    schedule TEXT,                            -- recurring schedule of which the command is a tick
    state    TEXT    NOT NULL CHECK (state IN ('waiting', 'started', 'parked')),
    reason   TEXT,                            -- reason for parking
    body     BLOB    NOT NULL                 -- encoded command
) STRICT;

CREATE INDEX storied_scheduled_commands_by_due ON storied_scheduled_commands (state, due_at, id);
CREATE INDEX storied_scheduled_commands_by_schedule ON storied_scheduled_commands (schedule, state, due_at, id)
    WHERE schedule IS NOT NULL;

-- Recurring schedules.
CREATE TABLE storied_schedules (
    name       TEXT    NOT NULL PRIMARY KEY,
    definition BLOB    NOT NULL,
    revision   INTEGER NOT NULL,              -- number of writes: 1, 2, 3 …
    next_at    INTEGER                        -- next tick, in microseconds since 1970; NULL: paused or ended
) STRICT;

CREATE INDEX storied_schedules_by_next ON storied_schedules (next_at, name) WHERE next_at IS NOT NULL;
