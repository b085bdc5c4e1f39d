-- Checkpoints and parked events: in the schema of the event store, and in every database with a
-- read model, so that they are committed together with the read model. Both may be the same schema,
-- hence IF NOT EXISTS.

CREATE TABLE IF NOT EXISTS storied.checkpoints (
    name       text        PRIMARY KEY,
    position   bigint      NOT NULL CHECK (position >= 0),
    epoch      bigint      NOT NULL CHECK (epoch >= 0),
    mark       bigint      NOT NULL CHECK (mark >= 0),
    store_id   uuid        NOT NULL,                             -- id of the store with this position
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()    -- an infinite time cannot be compared or shown
        CHECK (updated_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00')
);

CREATE TABLE IF NOT EXISTS storied.parked (
    name       text        NOT NULL,                             -- name of the projection
    position   bigint      NOT NULL CHECK (position >= 0),
    event_id   uuid        NOT NULL,
    category   text        NOT NULL,
    stream_id  text        NOT NULL,
    version    bigint      NOT NULL CHECK (version >= 0),
    event_name text        NOT NULL,
    error      text        NOT NULL,
    attempts   bigint      NOT NULL CHECK (attempts >= 0),
    parked_at  timestamptz NOT NULL
        CHECK (parked_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00'),
    PRIMARY KEY (name, position)
);
