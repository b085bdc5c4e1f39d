-- The log and the state stored beside it. Never edit this file after its release: databases store
-- its checksum.

-- Identity of the store (store_id), encoding of the payloads (codec) and home of the store.
CREATE TABLE storied_meta (
    key   TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE storied_events (
    position    INTEGER NOT NULL PRIMARY KEY, -- position in the log
    category    TEXT    NOT NULL,
    stream_id   TEXT    NOT NULL,
    version     INTEGER NOT NULL,             -- version in the stream: 1, 2, 3 …
    name        TEXT    NOT NULL,
    id          BLOB    NOT NULL,             -- UUID, 16 bytes
    command_id  BLOB    NOT NULL,             -- UUID, 16 bytes
    payload     BLOB    NOT NULL,             -- encoded with the codec of storied_meta
    metadata    BLOB    NOT NULL,             -- CBOR
    recorded_at INTEGER NOT NULL,             -- microseconds since 1970
    -- The id comes first, because it distinguishes streams sooner than the category.
    UNIQUE (stream_id, category, version)
) STRICT;

-- Finds the events of a command in a stream, for the life of the log.
CREATE INDEX storied_events_by_command ON storied_events (command_id, stream_id, category, version);

CREATE TRIGGER storied_events_no_update BEFORE UPDATE ON storied_events
BEGIN
    SELECT RAISE(ABORT, 'storied_events is append-only: write a new event instead of changing an old one');
END;

CREATE TRIGGER storied_events_no_delete BEFORE DELETE ON storied_events
BEGIN
    SELECT RAISE(ABORT, 'storied_events is append-only: followers rely on every event staying where it is');
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
