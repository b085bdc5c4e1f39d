-- How far projections have got: in the event store's own schema, and in every database that a read model lives in, so that
-- it can be committed together with the read model. Both may be the same schema, hence IF NOT EXISTS.

CREATE TABLE IF NOT EXISTS storied.checkpoints (
    name       text        PRIMARY KEY,
    position   bigint      NOT NULL,
    epoch      bigint      NOT NULL,
    mark       bigint      NOT NULL,
    store_id   uuid        NOT NULL,                             -- of which store's log this is a position
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE IF NOT EXISTS storied.parked (
    name       text        NOT NULL,                             -- of the projection
    position   bigint      NOT NULL,
    event_id   uuid        NOT NULL,
    category   text        NOT NULL,
    stream_id  text        NOT NULL,
    version    bigint      NOT NULL,
    event_name text        NOT NULL,
    error      text        NOT NULL,
    attempts   bigint      NOT NULL,
    parked_at  timestamptz NOT NULL,
    PRIMARY KEY (name, position)
);
