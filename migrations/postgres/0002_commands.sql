-- Records of commands without events in a stream, until they are deleted.
CREATE TABLE storied.commands (
    id          uuid        PRIMARY KEY,
    name        text        NOT NULL,
    fingerprint uuid        NOT NULL,                            -- fingerprint of the command's content
    outcome     bytea       NOT NULL,                            -- CBOR
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp()
        CHECK (recorded_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00')
);
CREATE INDEX commands_by_age ON storied.commands (recorded_at);
