-- The progress of projections: in the schema of the event store, and in every database with a read
-- model, so that it is committed together with the read model. Both may be the same schema, hence
-- IF NOT EXISTS.

-- Layout, versions and start position of each read model.
CREATE TABLE IF NOT EXISTS storied.projections (
    name             text   PRIMARY KEY,
    partitions       bigint NOT NULL CHECK (partitions >= 0),         -- 0: not partitioned
    live_version     bigint NOT NULL CHECK (live_version >= 0),       -- version that readers use
    building_version bigint CHECK (building_version >= 0),            -- NULL: no rebuild
    start_position   bigint CHECK (start_position >= 0),              -- last position that is never applied; NULL: unknown
    revision         bigint NOT NULL CHECK (revision >= 0),           -- number of writes of this row
    store_id         uuid   NOT NULL                                  -- id of the store with these positions
);

CREATE TABLE IF NOT EXISTS storied.checkpoints (
    projection text        NOT NULL,
    version    bigint      NOT NULL CHECK (version >= 0),        -- version of the read model
    partition  bigint      NOT NULL CHECK (partition >= 0),      -- 0 if not partitioned
    position   bigint      NOT NULL CHECK (position >= 0),       -- last applied position
    epoch      bigint      NOT NULL CHECK (epoch >= 0),          -- fencing token of the owner
    generation bigint      NOT NULL CHECK (generation >= 0),     -- number of resets and cut-overs
    delivered  bigint      NOT NULL CHECK (delivered >= 0),      -- delivered before the last reset
    store_id   uuid        NOT NULL,                             -- id of the store with this position
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()    -- an infinite time cannot be compared or shown
        CHECK (updated_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00'),
    PRIMARY KEY (projection, version, partition)
);

-- Requests of operators to the nodes. A node deletes a request together with the change.
CREATE TABLE IF NOT EXISTS storied.requests (
    projection     text        NOT NULL,
    kind           text COLLATE "C" NOT NULL CHECK (kind IN ('cancel_rebuild', 'rebuild', 'reset', 'retry')),
    position       bigint      NOT NULL CHECK (position >= 0),   -- parked event to retry, or 0
    id             uuid        NOT NULL,
    requested_at   timestamptz NOT NULL
        CHECK (requested_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00'),
    refused_reason text,                                         -- NULL: waiting
    PRIMARY KEY (projection, kind, position)
);

-- Dead letters: events that the checkpoint passed over because apply failed.
CREATE TABLE IF NOT EXISTS storied.parked (
    projection text        NOT NULL,
    version    bigint      NOT NULL CHECK (version >= 0),        -- version of the read model
    partition  bigint      NOT NULL CHECK (partition >= 0),      -- 0 if not partitioned
    position   bigint      NOT NULL CHECK (position >= 0),
    event_id   uuid        NOT NULL,
    category   text        NOT NULL,
    stream_id  text        NOT NULL,
    stream_version bigint  NOT NULL CHECK (stream_version >= 0),
    event_name text        NOT NULL,
    error      text        NOT NULL,
    attempts   bigint      NOT NULL CHECK (attempts >= 0),
    parked_at  timestamptz NOT NULL
        CHECK (parked_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00'),
    PRIMARY KEY (projection, version, partition, position)
);
