-- The log and what must live beside it. Never edit this file once it is released: databases remember its checksum.

-- Who the store is (store_id) and how it keeps payloads (codec).
CREATE TABLE storied_meta (
    key   TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE storied_events (
    position    INTEGER NOT NULL PRIMARY KEY, -- place in the log
    category    TEXT    NOT NULL,
    stream_id   TEXT    NOT NULL,
    version     INTEGER NOT NULL,             -- place in the stream: 1, 2, 3 …
    name        TEXT    NOT NULL,
    id          BLOB    NOT NULL,             -- UUID, 16 bytes
    command_id  BLOB    NOT NULL,             -- UUID, 16 bytes
    payload     BLOB    NOT NULL,             -- in the codec of storied_meta
    metadata    BLOB    NOT NULL,             -- CBOR
    recorded_at INTEGER NOT NULL,             -- microseconds since 1970
    -- The id comes first because it tells streams apart sooner than the category does.
    UNIQUE (stream_id, category, version)
) STRICT;

-- Finds the events of a command in a stream, for as long as the log lives.
CREATE INDEX storied_events_by_command ON storied_events (command_id, stream_id, category, version);

CREATE TRIGGER storied_events_no_update BEFORE UPDATE ON storied_events
BEGIN
    SELECT RAISE(ABORT, 'storied_events is append-only: write a new event instead of changing an old one');
END;

CREATE TRIGGER storied_events_no_delete BEFORE DELETE ON storied_events
BEGIN
    SELECT RAISE(ABORT, 'storied_events is append-only: followers rely on every event staying where it is');
END;

-- Projections that stand still, on every node.
CREATE TABLE storied_paused (
    name TEXT NOT NULL PRIMARY KEY
) STRICT, WITHOUT ROWID;

CREATE TABLE storied_leases (
    name       TEXT    NOT NULL PRIMARY KEY,
    owner      BLOB    NOT NULL,              -- UUID, 16 bytes
    epoch      INTEGER NOT NULL,              -- grows with every new owner
    expires_at INTEGER NOT NULL,              -- microseconds since 1970; 0: given back
    ttl        INTEGER NOT NULL               -- microseconds: how long a holder that lives leaves it unchanged
) STRICT, WITHOUT ROWID;

CREATE TABLE storied_snapshots (
    category  TEXT    NOT NULL,
    stream_id TEXT    NOT NULL,
    version   INTEGER NOT NULL,               -- up to which events are folded in
    revision  INTEGER NOT NULL,               -- of the state's schema
    state     BLOB    NOT NULL,
    PRIMARY KEY (category, stream_id)
) STRICT;
