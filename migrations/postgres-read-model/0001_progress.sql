-- How far projections have got: in the event store's own schema, and in every database that a read model lives in, so that
-- it can be committed together with the read model. Both may be the same schema, hence IF NOT EXISTS.

CREATE TABLE IF NOT EXISTS storied.checkpoints (
    name       text        PRIMARY KEY,
    position   bigint      NOT NULL CHECK (position >= 0),
    epoch      bigint      NOT NULL CHECK (epoch >= 0),
    mark       bigint      NOT NULL CHECK (mark >= 0),
    store_id   uuid        NOT NULL,                             -- of which store's log this is a position
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()    -- an infinite time can be neither compared nor shown
        CHECK (updated_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00')
);

CREATE TABLE IF NOT EXISTS storied.parked (
    name       text        NOT NULL,                             -- of the projection
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
