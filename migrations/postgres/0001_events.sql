-- The log and the state stored beside it. Never edit this file after its release: databases store
-- its checksum. If a program uses another schema than storied, its name replaces this one at run
-- time.

-- Identity of the store (store_id), encoding of the payloads (codec) and home of the store.
CREATE TABLE storied.meta (
    key   text PRIMARY KEY,
    value text NOT NULL
);

-- The order of the log depends on this sequence: it is drawn from singly (CACHE 1) and never set
-- back. Its end is 2^44 - 1, because higher positions do not fit into the key of the low-water
-- lock.
CREATE SEQUENCE storied.positions AS bigint INCREMENT 1 MINVALUE 1 MAXVALUE 17592186044415 START 1 CACHE 1 NO CYCLE;

CREATE TABLE storied.events (
    position    bigint      NOT NULL PRIMARY KEY,                -- position in the log, drawn by storied.append
    version     bigint      NOT NULL,                            -- version in the stream: 1, 2, 3 …
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    stream      uuid        NOT NULL,                            -- storied.stream_key(category, stream_id): half the index size of the text
    id          uuid        NOT NULL,
    command_id  uuid        NOT NULL,
    category    text        NOT NULL,
    stream_id   text        NOT NULL,
    name        text        NOT NULL,
    payload     bytea       NOT NULL,                            -- encoded with the codec of storied.meta
    metadata    bytea       NOT NULL,                            -- CBOR
    UNIQUE (stream, version)                                     -- decides between concurrent appends
);
-- Finds the events of a command in a stream, for the life of the log. Ids that begin with a time
-- (UUIDv7) are inserted at its right end, whatever the stream. A command with many streams or many
-- events is found as quickly.
CREATE INDEX events_by_command_id ON storied.events (command_id, stream, version);
-- The table only grows: without this setting, the visibility map would lag far behind.
ALTER TABLE storied.events SET (autovacuum_vacuum_insert_scale_factor = 0.05);

-- Rights: the functions that append run with the rights of the migrating login and check every
-- argument. The login of the program has no right to insert (docs/postgres-grants.sql). The names
-- in the functions do not depend on the search_path of the caller.

-- The key of a stream: the first 128 bits of a SHA-256. A category contains no slash, so no two
-- streams have the same text.
CREATE FUNCTION storied.stream_key(category text, stream_id text) RETURNS uuid
LANGUAGE sql STABLE STRICT PARALLEL SAFE
RETURN encode(substring(sha256(convert_to(category || '/' || stream_id, 'UTF8')) FROM 1 FOR 16), 'hex')::uuid;
REVOKE EXECUTE ON FUNCTION storied.stream_key FROM PUBLIC;

-- Whether readers can read a category or event name: 1 to 200 ASCII letters, digits, '_' or '-', in
-- tokens separated by single dots.
CREATE FUNCTION storied.is_name(name text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN name ~ '^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*$' AND octet_length(name) <= 200;
REVOKE EXECUTE ON FUNCTION storied.is_name FROM PUBLIC;

-- Whether a new stream has the key of its category and id, and readers can read both. The id has 1
-- to 400 bytes and no control character. Later events of a stream have the category and id of the
-- event that they follow.
CREATE FUNCTION storied.is_stream(key uuid, category text, stream_id text) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
RETURN coalesce(
    storied.is_name(category)
        AND octet_length(stream_id) BETWEEN 1 AND 400
        AND stream_id !~ '[\u0001-\u001f\u007f-\u009f]'
        AND key = storied.stream_key(category, stream_id),
    false);
REVOKE EXECUTE ON FUNCTION storied.is_stream FROM PUBLIC;

-- Appends a batch. Each unit (an append of the caller) is atomic and succeeds or fails
-- independently.
--
-- I1, the low-water lock: before a transaction draws a position, it takes a shared advisory lock
-- with the current value of the sequence in its key. While the lock is held, storied.high_water_mark()
-- stays below it, so no reader passes a position that is still to appear. The event before a new
-- one must exist with a lower position, so positions grow along every stream.
--
-- Every look-up of an event fits one index only, whatever the statistics say, because a plan may be
-- made while the table is empty.
CREATE FUNCTION storied.append(
    -- One entry for each part (the events of a unit for one stream), in the order of the batch.
    -- Each stream occurs only once.
    part_stream    uuid[],
    part_category  text[],
    part_stream_id text[],
    part_unit      integer[],
    part_expected  bigint[],           -- a version, 0 for no stream, -1 for any version, -2 for an existing stream
    part_events    integer[],          -- number of events, at least 1
    -- Whether to read the current versions first: needed for -1 and -2, and for a unit of several
    -- parts, which fails as a whole.
    look_up        boolean,
    -- One entry for each event, in the order of the parts.
    event_name       text[],
    event_id         uuid[],
    event_command_id uuid[],
    event_payload    bytea[],
    event_metadata   bytea[],
    OUT versions  bigint[],            -- for each part: version of the stream before the append, or the one that refused it
    OUT lost      boolean[],           -- for each part: met its expectation, but another transaction came first; null if none did
    OUT positions bigint[],            -- for each event; positions of events that were not appended remain holes
    OUT transaction_id text            -- id of this transaction, null if it wrote nothing
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Plans are made once per connection, perhaps while the table is empty; they must suit a large
-- table.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    accepted   boolean[];              -- for each part: whether its unit meets its expectations; null without a look-up
    parts      bigint := cardinality(part_stream);
    events     bigint := cardinality(event_id);
    event_part integer[];              -- for each event: its part, from 1 …
    event_n    integer[];              -- … and 1, 2, 3 … within its part
    won        bigint;
    guard      text;                   -- of events_are_appended
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: events would be acknowledged before they are durable'
            USING ERRCODE = 'ST002';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'appending needs the isolation level read committed, not %', current_setting('transaction_isolation')
            USING ERRCODE = 'ST002';
    END IF;
    -- Arrays are read by index below, and by unnest.
    IF NOT coalesce(
        array_lower(part_stream, 1) = 1 AND array_lower(part_category, 1) = 1 AND array_lower(part_stream_id, 1) = 1
            AND array_lower(part_unit, 1) = 1 AND array_lower(part_expected, 1) = 1
            AND cardinality(part_events) = parts AND 1 <= ALL (part_events)
            AND (SELECT sum(p.count) FROM unnest(part_events) AS p (count)) = events, false) THEN
        RAISE EXCEPTION 'parts and events do not fit together' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT n.name FROM unnest(event_name) AS n (name) OFFSET 0) AS n
        WHERE NOT coalesce(storied.is_name(n.name), false)) THEN
        RAISE EXCEPTION 'an event has a name that readers cannot read' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT array_agg(p.part ORDER BY p.part, n), array_agg(n ORDER BY p.part, n) INTO event_part, event_n
    FROM unnest(part_events) WITH ORDINALITY AS p (count, part), generate_series(1, p.count) AS n;

    PERFORM pg_advisory_xact_lock_shared(
        (('storied.positions'::regclass::oid::bigint & 1048575) << 44)
        | coalesce(pg_sequence_last_value('storied.positions'), 0));

    versions := part_expected;
    IF look_up THEN
        SELECT array_agg(d.actual ORDER BY d.part), array_agg(d.ok ORDER BY d.part), count(*) FILTER (WHERE d.ok)
        INTO versions, accepted, parts
        FROM (
            SELECT p.part, p.actual,
                bool_and(CASE p.expected WHEN -1 THEN true WHEN -2 THEN p.actual > 0 ELSE p.actual = p.expected END)
                    OVER (PARTITION BY p.unit) AS ok
            FROM (
                SELECT i.part, i.unit, i.expected,
                    coalesce((SELECT e.version FROM storied.events AS e
                        WHERE e.stream = i.stream ORDER BY e.version DESC LIMIT 1), 0) AS actual
                FROM unnest(part_stream, part_unit, part_expected) WITH ORDINALITY AS i (stream, unit, expected, part)
                OFFSET 0 -- one look-up for each part, however often it is mentioned above
            ) AS p
        ) AS d;
        IF parts = 0 THEN
            RETURN;
        END IF;
    END IF;
    IF 0 = ANY (versions) AND EXISTS (
        SELECT FROM unnest(versions, part_stream, part_category, part_stream_id) AS p (before, stream, category, stream_id)
        WHERE p.before = 0 AND NOT storied.is_stream(p.stream, p.category, p.stream_id)) THEN
        RAISE EXCEPTION 'a new stream has a key, category or id that readers cannot read'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;

    positions := ARRAY(SELECT nextval('storied.positions') FROM generate_series(1, events));

    -- Not SET in the head of the function: only a superuser may create a function that sets a custom
    -- parameter.
    guard := set_config('storied_log.appending', 'on', true);

    -- I2: the first event of each stream claims the next version. Sorted, so that transactions with
    -- common streams wait in the same order.
    INSERT INTO storied.events AS target
        (position, version, stream, id, command_id, category, stream_id, name, payload, metadata)
    SELECT positions[i.ord], versions[i.part] + 1, part_stream[i.part],
        i.id, i.command_id, part_category[i.part], part_stream_id[i.part], i.name, i.payload, i.metadata
    FROM unnest(event_part, event_n, event_name, event_id, event_command_id, event_payload, event_metadata)
        WITH ORDINALITY AS i (part, n, name, id, command_id, payload, metadata, ord)
    WHERE i.n = 1 AND (accepted IS NULL OR accepted[i.part])
        AND (versions[i.part] = 0 OR (
            SELECT e.position < positions[i.ord] AND e.category = part_category[i.part] AND e.stream_id = part_stream_id[i.part]
            FROM storied.events AS e
            WHERE e.stream = part_stream[i.part] AND e.version >= versions[i.part] AND e.version <= versions[i.part]
            ORDER BY e.version LIMIT 1)) -- a range with an order, which the index by command does not have
    ORDER BY part_stream[i.part]
    ON CONFLICT (stream, version) DO NOTHING;
    GET DIAGNOSTICS won = ROW_COUNT;

    IF won < parts THEN
        lost := ARRAY(
            -- Not EXISTS, which may become a scan of the whole log. A range with an order fits no
            -- other index.
            SELECT coalesce(accepted[i.part], true) AND (
                SELECT e.position FROM storied.events AS e
                WHERE e.position >= positions[i.ord] AND e.position <= positions[i.ord]
                ORDER BY e.position LIMIT 1) IS NULL
            FROM unnest(event_part, event_n) WITH ORDINALITY AS i (part, n, ord) WHERE i.n = 1 ORDER BY i.part);
        IF EXISTS (
            SELECT FROM generate_subscripts(lost, 1) AS p
            WHERE lost[p] AND cardinality(array_positions(part_unit, part_unit[p])) > 1) THEN
            -- The other parts of the unit can only be rolled back together with the whole call.
            RAISE EXCEPTION 'another transaction came first' USING ERRCODE = 'ST001';
        END IF;
        versions := ARRAY(
            SELECT CASE WHEN lost[p]
                THEN coalesce((SELECT e.version FROM storied.events AS e
                    WHERE e.stream = part_stream[p] ORDER BY e.version DESC LIMIT 1), 0)
                ELSE versions[p] END
            FROM generate_subscripts(lost, 1) AS p ORDER BY p);
    END IF;

    IF events > cardinality(part_stream) THEN
        INSERT INTO storied.events
            (position, version, stream, id, command_id, category, stream_id, name, payload, metadata)
        SELECT positions[i.ord], versions[i.part] + i.n, part_stream[i.part],
            i.id, i.command_id, part_category[i.part], part_stream_id[i.part], i.name, i.payload, i.metadata
        FROM unnest(event_part, event_n, event_name, event_id, event_command_id, event_payload, event_metadata)
            WITH ORDINALITY AS i (part, n, name, id, command_id, payload, metadata, ord)
        WHERE i.n > 1 AND (accepted IS NULL OR accepted[i.part]) AND (lost IS NULL OR NOT lost[i.part])
        ORDER BY part_stream[i.part], i.n;
    END IF;
    guard := set_config('storied_log.appending', 'off', true);
    transaction_id := pg_current_xact_id_if_assigned()::text;
END $$;
REVOKE EXECUTE ON FUNCTION storied.append FROM PUBLIC;

-- Returns the high-water mark: the last event below which no new event can appear (I1).
--
-- The function must stay VOLATILE and run at READ COMMITTED. Then each statement has a snapshot of
-- its own, and the last one sees all transactions committed before the locks were read.
CREATE FUNCTION storied.high_water_mark(
    OUT last_value bigint,             -- last drawn position
    OUT low_water  bigint,             -- all positions up to here are decided: visible, or never to be
    OUT head       bigint,             -- position of the last event up to low_water
    OUT head_id    uuid                -- id of that event, null if there is none
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'a standby does not see the locks of the primary' USING ERRCODE = 'read_only_sql_transaction';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'reading the high-water mark needs the isolation level read committed, not %',
            current_setting('transaction_isolation') USING ERRCODE = 'ST002';
    END IF;

    -- Null before the first draw, and after a RESTART of the sequence. Then the last event
    -- suffices: its position and all lower ones were drawn before this read. From PostgreSQL 17 on,
    -- null can also mean a missing right.
    last_value := pg_sequence_last_value('storied.positions');
    IF last_value IS NULL THEN
        IF NOT has_sequence_privilege('storied.positions', 'USAGE, SELECT') THEN
            RAISE EXCEPTION 'permission denied for sequence positions' USING ERRCODE = 'insufficient_privilege';
        END IF;
        last_value := coalesce((
            SELECT e.position FROM storied.events AS e WHERE e.position > 0 ORDER BY e.position DESC LIMIT 1), 0);
    END IF;
    low_water := (
        SELECT min(((l.classid::bigint << 32) | l.objid::bigint) & ((1::bigint << 44) - 1))
        FROM pg_locks AS l
        WHERE l.locktype = 'advisory' AND l.objsubid = 1
            AND (l.classid::bigint >> 12) = ('storied.positions'::regclass::oid::bigint & 1048575)
            AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()));
    low_water := least(last_value, low_water); -- least() ignores null
    SELECT e.position, e.id INTO head, head_id FROM storied.events AS e
    WHERE e.position <= low_water ORDER BY e.position DESC LIMIT 1;
    head := coalesce(head, 0);
END $$;
REVOKE EXECUTE ON FUNCTION storied.high_water_mark FROM PUBLIC;

-- Finds the events of commands in streams. For each pair with events, it returns its number in the
-- call, the versions of its first and last event, and the position of the last one. The form leaves
-- one possible index, whatever the statistics say.
CREATE FUNCTION storied.command_events(
    command_streams uuid[],
    command_ids     uuid[]
) RETURNS TABLE (n bigint, first_version bigint, last_version bigint, last_position bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
BEGIN
    RETURN QUERY
    SELECT c.n, f.version, l.version, l.position
    FROM unnest(command_streams, command_ids) WITH ORDINALITY AS c (stream, id, n)
    CROSS JOIN LATERAL (
        SELECT e.version FROM storied.events AS e
        WHERE (e.command_id, e.stream, e.version) >= (c.id, c.stream, 0)
            AND (e.command_id, e.stream, e.version) <= (c.id, c.stream, 9223372036854775807)
        ORDER BY e.command_id, e.stream, e.version LIMIT 1) AS f
    CROSS JOIN LATERAL (
        SELECT e.version, e.position FROM storied.events AS e
        WHERE (e.command_id, e.stream, e.version) >= (c.id, c.stream, 0)
            AND (e.command_id, e.stream, e.version) <= (c.id, c.stream, 9223372036854775807)
        ORDER BY e.command_id DESC, e.stream DESC, e.version DESC LIMIT 1) AS l;
END $$;
REVOKE EXECUTE ON FUNCTION storied.command_events FROM PUBLIC;

CREATE FUNCTION storied.refuse_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- Not a WHEN of the trigger, which is parsed for every INSERT and takes ten times as long. So
    -- would a CHECK constraint of the table.
    IF current_setting('storied_log.appending', true) IS DISTINCT FROM 'on' THEN
        RAISE EXCEPTION 'events are appended by %.append() only: an event that is inserted past it would be missed by readers',
            TG_TABLE_SCHEMA USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER events_are_appended BEFORE INSERT ON storied.events
    FOR EACH STATEMENT EXECUTE FUNCTION storied.refuse_insert();

CREATE FUNCTION storied.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the log is append-only: write a new event instead of changing an old one'
        USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER events_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON storied.events
    FOR EACH STATEMENT EXECUTE FUNCTION storied.refuse_change();

-- What operators control of projections, on every node.
CREATE TABLE storied.controls (
    projection       text    PRIMARY KEY,
    paused           boolean NOT NULL,
    trigger_position bigint  NOT NULL CHECK (trigger_position >= 0), -- manual triggers apply up to here
    triggers         bigint  NOT NULL CHECK (triggers >= 0),         -- number of manual triggers
    changes          bigint  NOT NULL CHECK (changes >= 0)           -- owners read their state again after each change
);

-- The end of the log stream that the publisher confirmed last.
CREATE TABLE storied.publisher (
    id       smallint PRIMARY KEY CHECK (id = 1),                    -- one row
    position bigint   NOT NULL CHECK (position >= 0),
    epoch    bigint   NOT NULL CHECK (epoch >= 0),                   -- fencing token of the publisher
    sequence bigint   NOT NULL CHECK (sequence >= 0)                 -- sequence number of the last message
);

CREATE TABLE storied.leases (
    name       text        PRIMARY KEY,
    owner      uuid        NOT NULL,
    epoch      bigint      NOT NULL CHECK (epoch >= 0),          -- fencing token, grows with every new owner
    expires_at timestamptz NOT NULL                              -- 1970: released
        CHECK (expires_at BETWEEN '1970-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00'),
    ttl        bigint      NOT NULL CHECK (ttl >= 0)             -- microseconds: the holder renews the lease within this time
);

CREATE TABLE storied.snapshots (
    category  text   NOT NULL,
    stream_id text   NOT NULL,
    version   bigint NOT NULL CHECK (version >= 0),              -- last event folded into the state
    revision  bigint NOT NULL CHECK (revision >= 0),             -- schema revision of the state
    state     bytea  NOT NULL,
    PRIMARY KEY (category, stream_id)
);
