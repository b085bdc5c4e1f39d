-- Checkpoints and parked events: in the file of the event store, and in every database with a read
-- model, so that they are committed together with the read model. Both may be the same file, hence
-- IF NOT EXISTS.

CREATE TABLE IF NOT EXISTS storied_checkpoints (
    name       TEXT    NOT NULL PRIMARY KEY,
    position   INTEGER NOT NULL,
    epoch      INTEGER NOT NULL,
    mark       INTEGER NOT NULL,
    store_id   BLOB    NOT NULL,              -- UUID, 16 bytes: id of the store with this position
    updated_at INTEGER NOT NULL               -- microseconds since 1970
) STRICT, WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS storied_parked (
    name       TEXT    NOT NULL,              -- name of the projection
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
