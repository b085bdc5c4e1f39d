-- How far projections have got: in the event store's own file, and in every database that a read model lives in, so that
-- it can be committed together with the read model. Both may be the same file, hence IF NOT EXISTS.

CREATE TABLE IF NOT EXISTS storied_checkpoints (
    name       TEXT    NOT NULL PRIMARY KEY,
    position   INTEGER NOT NULL,
    epoch      INTEGER NOT NULL,
    mark       INTEGER NOT NULL,
    store_id   BLOB    NOT NULL,              -- UUID, 16 bytes: of which store's log this is a position
    updated_at INTEGER NOT NULL               -- microseconds since 1970
) STRICT, WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS storied_parked (
    name       TEXT    NOT NULL,              -- of the projection
    position   INTEGER NOT NULL,
    event_id   BLOB    NOT NULL,              -- UUID, 16 bytes
    category   TEXT    NOT NULL,
    stream_id  TEXT    NOT NULL,
    version    INTEGER NOT NULL,
    event_name TEXT    NOT NULL,
    error      TEXT    NOT NULL,
    attempts   INTEGER NOT NULL,
    parked_at  INTEGER NOT NULL,              -- microseconds since 1970
    PRIMARY KEY (name, position)
) STRICT, WITHOUT ROWID;
