-- Records of commands without events in a stream, until they are deleted.
CREATE TABLE storied_commands (
    id          BLOB    NOT NULL PRIMARY KEY, -- UUID, 16 bytes
    name        TEXT    NOT NULL,
    fingerprint BLOB    NOT NULL,             -- UUID, 16 bytes: fingerprint of the command's content
    outcome     BLOB    NOT NULL,             -- CBOR
    recorded_at INTEGER NOT NULL              -- microseconds since 1970
) STRICT, WITHOUT ROWID;

CREATE INDEX storied_commands_by_age ON storied_commands (recorded_at);
