-- The progress of projections: in the file of the event store, and in every database with a read
-- model, so that it is committed together with the read model. Both may be the same file, hence
-- IF NOT EXISTS.

-- Layout, versions and start position of each read model.
CREATE TABLE IF NOT EXISTS storied_projections (
    name             TEXT    NOT NULL PRIMARY KEY,
    partitions       INTEGER NOT NULL,        -- 0: not partitioned
    live_version     INTEGER NOT NULL,        -- version that readers use
    building_version INTEGER,                 -- NULL: no rebuild
    start_position   INTEGER,                 -- last position that is never applied; NULL: unknown
    revision         INTEGER NOT NULL,        -- number of writes of this row
    store_id         BLOB    NOT NULL         -- UUID, 16 bytes: id of the store with these positions
) STRICT, WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS storied_checkpoints (
    projection TEXT    NOT NULL,
    version    INTEGER NOT NULL,              -- version of the read model
    partition  INTEGER NOT NULL,              -- 0 if not partitioned
    position   INTEGER NOT NULL,              -- last applied position
    epoch      INTEGER NOT NULL,              -- fencing token of the owner
    generation INTEGER NOT NULL,              -- number of resets and cut-overs
    delivered  INTEGER NOT NULL,              -- delivered before the last reset
    store_id   BLOB    NOT NULL,              -- UUID, 16 bytes: id of the store with this position
    updated_at INTEGER NOT NULL,              -- microseconds since 1970
    PRIMARY KEY (projection, version, partition)
) STRICT, WITHOUT ROWID;

-- Requests of operators to the nodes. A node deletes a request together with the change.
CREATE TABLE IF NOT EXISTS storied_requests (
    projection     TEXT    NOT NULL,
    kind           TEXT    NOT NULL,          -- cancel_rebuild, rebuild, reset or retry
    position       INTEGER NOT NULL,          -- parked event to retry, or 0
    id             BLOB    NOT NULL,          -- UUID, 16 bytes
    requested_at   INTEGER NOT NULL,          -- microseconds since 1970
    refused_reason TEXT,                      -- NULL: waiting
    PRIMARY KEY (projection, kind, position)
) STRICT, WITHOUT ROWID;

-- Dead letters: events that the checkpoint passed over because apply failed.
CREATE TABLE IF NOT EXISTS storied_parked (
    projection TEXT    NOT NULL,
    version    INTEGER NOT NULL,              -- version of the read model
    partition  INTEGER NOT NULL,              -- 0 if not partitioned
    position   INTEGER NOT NULL,
    event_id   BLOB    NOT NULL,              -- UUID, 16 bytes
    category   TEXT    NOT NULL,
    stream_id  TEXT    NOT NULL,
    stream_version INTEGER NOT NULL,
    event_name TEXT    NOT NULL,
    error      TEXT    NOT NULL,
    attempts   INTEGER NOT NULL,
    parked_at  INTEGER NOT NULL,              -- microseconds since 1970
    PRIMARY KEY (projection, version, partition, position)
) STRICT, WITHOUT ROWID;
