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

-- The numbers of categories and event names. A number is computed from its name: a server that lost
-- the row in a failover gives the name the same number again, so programs may cache it without a limit.
CREATE TABLE storied.names (
    number integer NOT NULL PRIMARY KEY CHECK (number >= 0),
    name   text    NOT NULL COLLATE "C" UNIQUE
);

-- The low bits of the numbers of streams.
CREATE SEQUENCE storied.stream_numbers AS bigint MINVALUE 0 MAXVALUE 4194303 CACHE 1 CYCLE;

-- The numbers of streams, in the order of their creation: the time in milliseconds since 2020,
-- followed by 22 bits of a sequence. A number is never given again, also not by a server that lost
-- the row in a failover, so programs may cache it without a limit.
CREATE TABLE storied.streams (
    number    bigint  NOT NULL PRIMARY KEY
        DEFAULT ((extract(epoch FROM clock_timestamp()) * 1000)::bigint - 1577836800000) << 22 | nextval('storied.stream_numbers'),
    category  integer NOT NULL,                                  -- number of a name
    stream_id text    NOT NULL COLLATE "C",
    UNIQUE (stream_id, category)                                 -- the id first: it distinguishes streams sooner
);

CREATE TABLE storied.events (
    position    bigint      NOT NULL                             -- position in the log, drawn by storied.append
        CONSTRAINT storied_events_position PRIMARY KEY,
    stream      bigint      NOT NULL,                            -- number of the stream
    version     bigint      NOT NULL,                            -- version in the stream: 1, 2, 3 …
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    name        integer     NOT NULL,                            -- number of the event name
    category    integer     NOT NULL,                            -- that of the stream, for filters
    id          uuid        NOT NULL,
    command_id  uuid        NOT NULL,
    payload     bytea       NOT NULL,                            -- encoded with the codec of storied.meta
    metadata    bytea       NOT NULL,                            -- CBOR
    CONSTRAINT storied_events_version UNIQUE (stream, version)   -- decides between concurrent appends
);
-- Finds the events of a command in a stream, for the life of the log. Ids that begin with a time
-- (UUIDv7) are inserted at its right end, whatever the stream. A command with many streams or many
-- events is found as quickly.
CREATE INDEX events_by_command_id ON storied.events (command_id, stream, version);
-- The table only grows: without this setting, the visibility map would lag far behind.
ALTER TABLE storied.events SET (autovacuum_vacuum_insert_scale_factor = 0.05);

-- The events whose correlation id is not the id of their command: those of nested commands. Not a
-- column of the log, so that all other events take no space for it.
CREATE TABLE storied.correlations (
    correlation_id uuid   NOT NULL,
    position       bigint NOT NULL,                              -- position of the event
    PRIMARY KEY (correlation_id, position)
);
ALTER TABLE storied.correlations SET (autovacuum_vacuum_insert_scale_factor = 0.05);

-- The tags of events. Not a column of the log, so that events without tags take no space for them.
CREATE TABLE storied.tags (
    tag      text    NOT NULL COLLATE "C",
    position bigint  NOT NULL,                                   -- position of the event
    name     integer NOT NULL,                                   -- number of the event name
    PRIMARY KEY (tag, position) INCLUDE (name)
);
ALTER TABLE storied.tags SET (autovacuum_vacuum_insert_scale_factor = 0.05);

-- The log in clear, for people and tools.
CREATE VIEW storied.log AS
    SELECT e.position, c.name AS category, s.stream_id, e.version, n.name, e.id, e.command_id, e.recorded_at, e.payload, e.metadata
    FROM storied.events AS e
    JOIN storied.streams AS s ON s.number = e.stream
    JOIN storied.names AS c ON c.number = s.category
    JOIN storied.names AS n ON n.number = e.name;

-- Rights: the functions that append run with the rights of the migrating login and check their
-- arguments. The login of the program has no right to insert (docs/postgres-grants.sql). The names
-- in the functions do not depend on the search_path of the caller.

-- Whether readers can read a category or event name: 1 to 200 ASCII letters, digits, '_' or '-', in
-- tokens separated by single dots.
CREATE FUNCTION storied.is_name(name text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN name ~ '^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*$' AND octet_length(name) <= 200;
REVOKE EXECUTE ON FUNCTION storied.is_name FROM PUBLIC;

-- Whether readers can read the id of a stream: 1 to 400 bytes without control characters.
CREATE FUNCTION storied.is_stream_id(stream_id text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN octet_length(stream_id) BETWEEN 1 AND 400 AND stream_id !~ '[\u0001-\u001f\u007f-\u009f]';
REVOKE EXECUTE ON FUNCTION storied.is_stream_id FROM PUBLIC;

-- The number of the log on this server process, of the start time and the file of the events (of
-- database and table). A caller that names it proves that no failover, restart or restore, and no
-- committed TRUNCATE, came between what it learned and its append.
CREATE FUNCTION storied.server() RETURNS bigint
LANGUAGE sql STABLE PARALLEL SAFE
RETURN pg_catalog.hashtextextended(
    pg_catalog.pg_relation_filepath('storied.events') COLLATE "C",
    (extract(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000)::bigint);
REVOKE EXECUTE ON FUNCTION storied.server FROM PUBLIC;

-- Returns the number of a stream, null if it does not exist.
CREATE FUNCTION storied.stream_number(category text, stream_id text) RETURNS bigint
LANGUAGE plpgsql STABLE STRICT
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
BEGIN
    RETURN (
        SELECT s.number FROM storied.streams AS s
        WHERE s.stream_id = stream_number.stream_id
            AND s.category = (SELECT n.number FROM storied.names AS n WHERE n.name = stream_number.category));
END $$;
REVOKE EXECUTE ON FUNCTION storied.stream_number FROM PUBLIC;

-- Returns the numbers of names, in their order, and the number of the server process; adds the
-- missing ones.
CREATE FUNCTION storied.number_names(wanted text[], OUT numbers integer[], OUT server bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    missing text;
    salt    integer;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: names would be used before they are durable' USING ERRCODE = 'ST002';
    END IF;
    server := storied.server();
    -- Sorted, so that transactions with common names wait in the same order.
    FOR missing IN
        SELECT DISTINCT w.name COLLATE "C" AS name FROM unnest(wanted) AS w (name)
        WHERE NOT EXISTS (SELECT FROM storied.names AS n WHERE n.name = w.name) ORDER BY 1
    LOOP
        IF NOT coalesce(storied.is_name(missing), false) THEN
            RAISE EXCEPTION 'a name that readers cannot read' USING ERRCODE = 'invalid_parameter_value';
        END IF;
        salt := 0;
        -- A taken number belongs to this name now, or to another one with the same hash.
        LOOP
            INSERT INTO storied.names (number, name)
            VALUES (('x' || left(md5(missing || '/' || salt), 8))::bit(32)::integer & 2147483647, missing)
            ON CONFLICT DO NOTHING;
            EXIT WHEN EXISTS (SELECT FROM storied.names AS n WHERE n.name = missing);
            salt := salt + 1;
        END LOOP;
    END LOOP;
    numbers := ARRAY(
        SELECT n.number FROM unnest(wanted) WITH ORDINALITY AS w (name, i) JOIN storied.names AS n ON n.name = w.name ORDER BY w.i);
END $$;
REVOKE EXECUTE ON FUNCTION storied.number_names FROM PUBLIC;

-- Returns how far the log is readable after the commit of an append, if no other append is in flight:
-- the position before the event in the log (0: none), and the time of its recording in microseconds
-- since 1970. That saves waiting readers the call of storied.high_water_mark(). A transaction with a
-- lower position has taken the low-water lock before its draw, and holds it until its end. So if no
-- other transaction holds the lock after the draw, all lower positions are decided, and a later
-- statement sees all of them.
CREATE FUNCTION storied.settled(drawn bigint, recorded timestamptz) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    -- After the draw, and before the query of the log.
    IF EXISTS (
        SELECT FROM pg_locks AS l
        WHERE l.locktype = 'advisory' AND l.objsubid = 1
            AND (l.classid::bigint >> 12) = ('storied.positions'::regclass::oid::bigint & 1048575)
            AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND l.pid IS DISTINCT FROM pg_backend_pid()) THEN -- prepared transactions have no pid
        RETURN NULL;
    END IF;
    RETURN ARRAY[
        coalesce((
            SELECT e.position FROM storied.events AS e
            WHERE e.position < drawn ORDER BY e.position DESC LIMIT 1), 0),
        (extract(epoch FROM recorded) * 1000000)::bigint];
END $$;
REVOKE EXECUTE ON FUNCTION storied.settled FROM PUBLIC;

-- Appends a batch. Each unit (an append of the caller) is atomic and succeeds or fails
-- independently.
--
-- I1, the low-water lock: before a transaction draws a position, it takes a shared advisory lock
-- with the current value of the sequence in its key. While the lock is held, storied.high_water_mark()
-- stays below it, so no reader passes a position that is still to appear.
--
-- I2: the event before a new one must exist with a lower position, so versions have no holes and
-- positions grow along every stream. A caller may vouch for that event by the number of the stream:
-- it has seen the event on this server process, at or before known_position. An event that was
-- committed there stays, so the function does not look it up. Of all other events it does.
--
-- A plain INSERT is the first attempt. After a violation the events are inserted again, each stream
-- by itself.
--
-- Every look-up of an event fits one index only, whatever the statistics say, because a plan may be
-- made while the table is empty.
CREATE FUNCTION storied.append(
    known_server   bigint,             -- storied.server() when the caller learned the numbers below
    known_position bigint,             -- the caller has seen the events that known streams end with at or before this position
    -- One entry for each part (the events of a unit for one stream), in the order of the batch.
    -- Each stream occurs only once.
    part_stream    bigint[],           -- number of a stream whose event with the expected version the caller has seen; else null
    part_category  integer[],
    part_stream_id text[],             -- null if the number is known
    part_unit      integer[],
    part_expected  bigint[],           -- a version, 0 for no stream, -1 for any version, -2 for an existing stream
    part_events    integer[],          -- number of events, at least 1
    -- Whether to read the current versions first: needed for -1 and -2, and for a unit of several
    -- parts, which fails as a whole.
    look_up        boolean,
    used_names     integer[],          -- the categories and names of the batch, each once
    -- One entry for each event, in the order of the parts.
    event_name       integer[],
    event_id         uuid[],
    event_command_id uuid[],
    event_payload    bytea[],
    event_metadata   bytea[],
    settle           boolean DEFAULT false, -- whether to return storied.settled(), if the call has a single event
    event_correlation uuid[] DEFAULT NULL,  -- correlation ids, each null if it is the id of the command; null: all are
    OUT streams   bigint[],            -- for each part: number of the stream, null if it does not exist; null if known_server is another one: nothing was done
    OUT versions  bigint[],            -- for each part: version of the stream before the append, or the one that refused it
    OUT lost      boolean[],           -- for each part: met its expectation, but another transaction came first; null if none did
    OUT positions bigint[],            -- for each event; positions of events that were not appended remain holes
    OUT transaction_id text,           -- id of this transaction, null if it wrote nothing
    OUT settled   bigint[]             -- storied.settled() of the event
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
    parts      bigint := cardinality(part_expected);
    events     bigint := cardinality(event_id);
    event_part integer[];              -- for each event: its part, from 1 …
    event_n    integer[];              -- … and 1, 2, 3 … within its part
    known      boolean;                -- whether the caller vouches for every part
    plain      boolean;                -- whether the events can be inserted without a look at each stream
    won        bigint;
    last_event bigint;
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
    IF known_server IS DISTINCT FROM storied.server() THEN
        RETURN;
    END IF;
    -- Arrays are read by index below, and by unnest.
    IF NOT coalesce(
        array_lower(part_stream, 1) = 1 AND array_lower(part_category, 1) = 1 AND array_lower(part_stream_id, 1) = 1
            AND array_lower(part_unit, 1) = 1 AND array_lower(part_expected, 1) = 1 AND array_lower(part_events, 1) = 1
            AND array_lower(event_name, 1) = 1 AND array_lower(event_id, 1) = 1
            AND cardinality(part_stream) = parts AND cardinality(part_category) = parts AND cardinality(part_stream_id) = parts
            AND cardinality(part_unit) = parts AND cardinality(part_events) = parts AND cardinality(event_name) = events
            AND events >= parts AND 1 <= ALL (part_events) AND event_name <@ used_names AND part_category <@ used_names, false) THEN
        RAISE EXCEPTION 'parts, events and names do not fit together' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- An expression without a query takes a tenth of the time of one with a query.
    IF events > parts OR NOT 1 = ALL (part_events) THEN
        IF (SELECT sum(p.count) FROM unnest(part_events) AS p (count)) <> events THEN
            RAISE EXCEPTION 'parts and events do not fit together' USING ERRCODE = 'invalid_parameter_value';
        END IF;
        SELECT array_agg(p.part ORDER BY p.part, n), array_agg(n ORDER BY p.part, n) INTO event_part, event_n
        FROM unnest(part_events) WITH ORDINALITY AS p (count, part), generate_series(1, p.count) AS n;
    END IF;

    known := array_position(part_stream, NULL) IS NULL AND known_position IS NOT NULL;
    IF known THEN
        IF NOT 1 <= ALL (part_expected) THEN
            RAISE EXCEPTION 'a stream is known by an event' USING ERRCODE = 'invalid_parameter_value';
        END IF;
        streams := part_stream;
    ELSE
        IF EXISTS (
            SELECT FROM unnest(part_stream, part_stream_id, part_expected) AS p (stream, stream_id, expected)
            WHERE CASE WHEN p.stream IS NULL THEN NOT coalesce(storied.is_stream_id(p.stream_id), false) OR p.expected IS NULL
                ELSE known_position IS NULL OR NOT coalesce(p.expected >= 1, false) END) THEN
            RAISE EXCEPTION 'a stream has an id that readers cannot read, or is not known by an event'
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        -- Before the low-water lock, because another transaction may be creating the same stream.
        -- Sorted, so that transactions with common streams wait in the same order.
        INSERT INTO storied.streams (category, stream_id)
        SELECT p.category, p.stream_id
        FROM unnest(part_stream, part_category, part_stream_id, part_expected) AS p (stream, category, stream_id, expected)
        WHERE p.stream IS NULL AND p.expected IN (0, -1)
        ORDER BY p.stream_id COLLATE "C", p.category
        ON CONFLICT DO NOTHING;
        streams := ARRAY(
            SELECT coalesce(p.stream, (
                SELECT s.number FROM storied.streams AS s WHERE s.stream_id = p.stream_id AND s.category = p.category))
            FROM unnest(part_stream, part_category, part_stream_id) WITH ORDINALITY AS p (stream, category, stream_id, part)
            ORDER BY p.part);
    END IF;

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
                FROM unnest(streams, part_unit, part_expected) WITH ORDINALITY AS i (stream, unit, expected, part)
                OFFSET 0 -- one look-up for each part, however often it is mentioned above
            ) AS p
        ) AS d;
        IF parts = 0 THEN
            RETURN;
        END IF;
    END IF;

    positions := ARRAY(SELECT nextval('storied.positions') FROM generate_series(1, events));
    IF (SELECT count(*) FROM storied.names AS n WHERE n.number = ANY (used_names)) <> cardinality(used_names) THEN
        RAISE EXCEPTION 'a category or an event name has no number' USING ERRCODE = 'invalid_parameter_value';
    END IF;

    -- Not SET in the head of the function: only a superuser may create a function that sets a custom
    -- parameter.
    guard := set_config('storied_log.appending', 'on', true);

    plain := NOT look_up AND (known_position IS NULL OR known_position < positions[1]);
    IF plain AND NOT known THEN
        plain := NOT EXISTS (
            SELECT FROM unnest(streams, part_stream, part_expected) AS p (stream, known, expected)
            WHERE p.known IS NULL AND (p.stream IS NULL OR p.expected <> 0 AND NOT coalesce((
                SELECT e.position < positions[1] FROM storied.events AS e
                WHERE e.stream = p.stream AND e.version >= p.expected AND e.version <= p.expected
                ORDER BY e.version LIMIT 1), false))); -- a range with an order, which the index by command does not have
    END IF;
    IF plain THEN
        BEGIN
            -- Sorted, so that transactions with common streams wait in the same order.
            IF event_part IS NULL THEN
                INSERT INTO storied.events
                    (position, version, stream, id, command_id, category, name, payload, metadata)
                SELECT i.position, i.expected + 1, i.stream, i.id, i.command_id, i.category, i.name, i.payload, i.metadata
                FROM unnest(positions, streams, part_expected, part_category, event_name, event_id, event_command_id, event_payload, event_metadata)
                    AS i (position, stream, expected, category, name, id, command_id, payload, metadata)
                ORDER BY i.stream;
            ELSE
                INSERT INTO storied.events
                    (position, version, stream, id, command_id, category, name, payload, metadata)
                SELECT i.position, part_expected[i.part] + i.n, streams[i.part], i.id, i.command_id, part_category[i.part], i.name, i.payload, i.metadata
                FROM unnest(positions, event_part, event_n, event_name, event_id, event_command_id, event_payload, event_metadata)
                    AS i (position, part, n, name, id, command_id, payload, metadata)
                ORDER BY streams[i.part], i.n;
            END IF;
        EXCEPTION WHEN unique_violation THEN
            plain := false;
        END;
    END IF;

    IF NOT plain THEN
        IF event_part IS NULL THEN
            event_part := ARRAY(SELECT generate_series(1, events));
            event_n := array_fill(1, ARRAY[events::integer]);
        END IF;
        -- The first event of each stream claims the next version.
        INSERT INTO storied.events AS target
            (position, version, stream, id, command_id, category, name, payload, metadata)
        SELECT positions[i.ord], versions[i.part] + 1, streams[i.part],
            i.id, i.command_id, part_category[i.part], i.name, i.payload, i.metadata
        FROM unnest(event_part, event_n, event_name, event_id, event_command_id, event_payload, event_metadata)
            WITH ORDINALITY AS i (part, n, name, id, command_id, payload, metadata, ord)
        WHERE i.n = 1 AND streams[i.part] IS NOT NULL AND (accepted IS NULL OR accepted[i.part])
            AND (versions[i.part] = 0 OR (
                SELECT e.position < positions[i.ord] AND e.category = part_category[i.part]
                FROM storied.events AS e
                WHERE e.stream = streams[i.part] AND e.version >= versions[i.part] AND e.version <= versions[i.part]
                ORDER BY e.version LIMIT 1))
        ORDER BY streams[i.part]
        ON CONFLICT (stream, version) DO NOTHING;
        GET DIAGNOSTICS won = ROW_COUNT;

        IF won < parts THEN
            lost := ARRAY(
                -- Not EXISTS, which may become a scan of the whole log. A range with an order fits
                -- no other index. The id, because a sequence that was set back draws the positions of
                -- other events.
                SELECT coalesce(accepted[i.part], true) AND (
                    SELECT e.id FROM storied.events AS e
                    WHERE e.position >= positions[i.ord] AND e.position <= positions[i.ord]
                    ORDER BY e.position LIMIT 1) IS DISTINCT FROM i.id
                FROM unnest(event_part, event_n, event_id) WITH ORDINALITY AS i (part, n, id, ord) WHERE i.n = 1 ORDER BY i.part);
            -- In this order: no event has a position that was not drawn before it.
            last_event := (SELECT e.position FROM storied.events AS e WHERE e.position > 0 ORDER BY e.position DESC LIMIT 1);
            IF last_event > pg_sequence_last_value('storied.positions') THEN
                RAISE EXCEPTION 'the sequence of positions was set back, below the last event at %', last_event USING ERRCODE = 'ST003';
            END IF;
            IF EXISTS (
                SELECT FROM generate_subscripts(lost, 1) AS p
                WHERE lost[p] AND cardinality(array_positions(part_unit, part_unit[p])) > 1) THEN
                -- The other parts of the unit can only be rolled back together with the whole call.
                RAISE EXCEPTION 'another transaction came first' USING ERRCODE = 'ST001';
            END IF;
            versions := ARRAY(
                SELECT CASE WHEN lost[p]
                    THEN coalesce((SELECT e.version FROM storied.events AS e
                        WHERE e.stream = streams[p] ORDER BY e.version DESC LIMIT 1), 0)
                    ELSE versions[p] END
                FROM generate_subscripts(lost, 1) AS p ORDER BY p);
        END IF;

        IF events > cardinality(streams) THEN
            INSERT INTO storied.events
                (position, version, stream, id, command_id, category, name, payload, metadata)
            SELECT positions[i.ord], versions[i.part] + i.n, streams[i.part],
                i.id, i.command_id, part_category[i.part], i.name, i.payload, i.metadata
            FROM unnest(event_part, event_n, event_name, event_id, event_command_id, event_payload, event_metadata)
                WITH ORDINALITY AS i (part, n, name, id, command_id, payload, metadata, ord)
            WHERE i.n > 1 AND (accepted IS NULL OR accepted[i.part]) AND (lost IS NULL OR NOT lost[i.part])
            ORDER BY streams[i.part], i.n;
        END IF;
    END IF;
    IF event_correlation IS NOT NULL THEN
        INSERT INTO storied.correlations (correlation_id, position)
        SELECT i.correlation, i.position
        FROM unnest(event_correlation, positions, event_id) AS i (correlation, position, id)
        WHERE i.correlation IS NOT NULL AND (plain OR i.id = (
            SELECT e.id FROM storied.events AS e
            WHERE e.position >= i.position AND e.position <= i.position ORDER BY e.position LIMIT 1));
    END IF;
    guard := set_config('storied_log.appending', 'off', true);
    transaction_id := pg_current_xact_id_if_assigned()::text;
    IF settle AND events = 1 AND lost IS NULL THEN
        settled := storied.settled(positions[1], (
            SELECT e.recorded_at FROM storied.events AS e
            WHERE e.position >= positions[1] AND e.position <= positions[1] ORDER BY e.position LIMIT 1));
    END IF;
END $$;
REVOKE EXECUTE ON FUNCTION storied.append FROM PUBLIC;

-- Like storied.append(), for units of one part each, whose streams the caller knows. It takes less
-- time, because each array has one entry for each event and nothing is read.
--
-- If the caller names another server process, if the sequence was set back, or after a violation, the
-- function returns null and changes nothing; storied.append() then looks at each stream.
CREATE FUNCTION storied.append_known(
    known_server     bigint,           -- as in storied.append
    known_position   bigint,
    used_names       integer[],
    event_stream     bigint[],         -- sorted, so that transactions with common streams wait in the same order
    event_expected   bigint[],         -- version of the event before it in the stream
    event_category   integer[],
    event_name       integer[],
    event_id         uuid[],
    event_command_id uuid[],
    event_payload    bytea[],
    event_metadata   bytea[],
    event_correlation uuid[] DEFAULT NULL -- as in storied.append
) RETURNS bigint[]                     -- position of each event
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    positions bigint[];
    violated  text;                    -- name of a constraint
    guard     text;                    -- as in storied.append
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: events would be acknowledged before they are durable'
            USING ERRCODE = 'ST002';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'appending needs the isolation level read committed, not %', current_setting('transaction_isolation')
            USING ERRCODE = 'ST002';
    END IF;
    IF known_server IS DISTINCT FROM storied.server() THEN
        RETURN NULL;
    END IF;
    -- Arrays of other lengths leave columns without a value, which the table refuses.
    IF NOT coalesce(
        known_position >= 1 AND 1 <= ALL (event_expected) AND cardinality(event_stream) = cardinality(event_id)
            AND event_name <@ used_names AND event_category <@ used_names, false) THEN
        RAISE EXCEPTION 'events and names do not fit together, or a stream is not known by an event'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;

    PERFORM pg_advisory_xact_lock_shared(
        (('storied.positions'::regclass::oid::bigint & 1048575) << 44)
        | coalesce(pg_sequence_last_value('storied.positions'), 0));

    positions := ARRAY(SELECT nextval('storied.positions') FROM generate_series(1, cardinality(event_id)));
    IF positions[1] <= known_position THEN
        RETURN NULL;
    END IF;
    IF (SELECT count(*) FROM storied.names AS n WHERE n.number = ANY (used_names)) <> cardinality(used_names) THEN
        RAISE EXCEPTION 'a category or an event name has no number' USING ERRCODE = 'invalid_parameter_value';
    END IF;

    guard := set_config('storied_log.appending', 'on', true);
    BEGIN
        INSERT INTO storied.events
            (position, version, stream, id, command_id, category, name, payload, metadata)
        SELECT i.position, i.expected + 1, i.stream, i.id, i.command_id, i.category, i.name, i.payload, i.metadata
        FROM unnest(positions, event_stream, event_expected, event_category, event_name, event_id, event_command_id, event_payload, event_metadata)
            AS i (position, stream, expected, category, name, id, command_id, payload, metadata);
    EXCEPTION WHEN unique_violation THEN
        GET STACKED DIAGNOSTICS violated = CONSTRAINT_NAME;
        IF violated = 'storied_events_position' THEN
            RAISE; -- the sequence was set back
        END IF;
        positions := NULL;
    END;
    IF event_correlation IS NOT NULL AND positions IS NOT NULL THEN
        INSERT INTO storied.correlations (correlation_id, position)
        SELECT i.correlation, i.position FROM unnest(event_correlation, positions) AS i (correlation, position)
        WHERE i.correlation IS NOT NULL;
    END IF;
    guard := set_config('storied_log.appending', 'off', true);
    RETURN positions;
END $$;
REVOKE EXECUTE ON FUNCTION storied.append_known FROM PUBLIC;

-- Like storied.append(), for the most frequent cases: one event that follows an event which the
-- caller has seen, or the first event of a stream. It takes half the time, because its arguments are
-- not arrays.
--
-- If the caller names another server process, the sequence was set back or the stream to be created
-- exists, the function returns null and changes nothing; storied.append() then looks at the stream.
-- So it does after a violation.
CREATE FUNCTION storied.append_one(
    known_server     bigint,
    known_position   bigint,           -- position of the previous event, or a higher one; null if there is none
    event_stream     bigint,           -- null: creates the stream
    event_stream_id  text,             -- null if the stream exists
    event_expected   bigint,           -- version of the previous event; 0 if there is none
    event_category   integer,
    event_name       integer,
    event_id         uuid,
    event_command_id uuid,
    event_payload    bytea,
    event_metadata   bytea,
    settle           boolean,          -- whether to add storied.settled()
    event_correlation uuid DEFAULT NULL -- null if it is the id of the command
) RETURNS bigint[]                     -- number of the stream and position of the event, then the values of storied.settled()
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    drawn    bigint;
    recorded timestamptz;
    guard    text;                     -- as in storied.append
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: events would be acknowledged before they are durable'
            USING ERRCODE = 'ST002';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'appending needs the isolation level read committed, not %', current_setting('transaction_isolation')
            USING ERRCODE = 'ST002';
    END IF;
    IF known_server IS DISTINCT FROM storied.server() THEN
        RETURN NULL;
    END IF;
    IF NOT coalesce(CASE WHEN event_stream IS NULL
        THEN event_expected = 0 AND known_position IS NULL AND storied.is_stream_id(event_stream_id)
        ELSE event_expected >= 1 AND known_position >= 1 END, false) THEN
        RAISE EXCEPTION 'a stream has an id that readers cannot read, or is not known by an event'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF (SELECT count(*) FROM storied.names AS n WHERE n.number = event_category OR n.number = event_name)
        <> (CASE WHEN event_category = event_name THEN 1 ELSE 2 END) THEN
        RAISE EXCEPTION 'the category or the event name has no number' USING ERRCODE = 'invalid_parameter_value';
    END IF;

    IF event_stream IS NULL THEN
        -- Before the low-water lock, because another transaction may be creating the same stream.
        INSERT INTO storied.streams AS s (category, stream_id) VALUES (event_category, event_stream_id)
        ON CONFLICT DO NOTHING RETURNING s.number INTO event_stream;
        IF event_stream IS NULL THEN
            RETURN NULL;
        END IF;
    END IF;

    PERFORM pg_advisory_xact_lock_shared(
        (('storied.positions'::regclass::oid::bigint & 1048575) << 44)
        | coalesce(pg_sequence_last_value('storied.positions'), 0));

    drawn := nextval('storied.positions');
    IF drawn <= known_position THEN
        RETURN NULL;
    END IF;

    guard := set_config('storied_log.appending', 'on', true);
    INSERT INTO storied.events AS target
        (position, version, stream, id, command_id, category, name, payload, metadata)
    VALUES (drawn, event_expected + 1, event_stream,
        event_id, event_command_id, event_category, event_name, event_payload, event_metadata)
    RETURNING target.recorded_at INTO recorded;
    IF event_correlation IS NOT NULL THEN
        INSERT INTO storied.correlations (correlation_id, position) VALUES (event_correlation, drawn);
    END IF;
    guard := set_config('storied_log.appending', 'off', true);

    RETURN ARRAY[event_stream, drawn] || CASE WHEN settle THEN storied.settled(drawn, recorded) END;
END $$;
REVOKE EXECUTE ON FUNCTION storied.append_one FROM PUBLIC;

-- I13, the tag locks: an append with tags takes a shared lock on each of them, before all other locks,
-- and holds it until its end. A conditional append takes an exclusive lock on one tag of each item of
-- its query. The locks are taken in the order of their keys, so appends cannot wait for each other in
-- a circle. A key is two integers, which readers of the low-water lock do not see: theirs is a bigint.
--
-- Returns the key of a tag; two tags may have the same one. The seed keeps the stores of a database
-- apart.
CREATE FUNCTION storied.tag_key(tag text) RETURNS bigint
LANGUAGE sql STABLE
AS $$
    SELECT pg_catalog.hashtextextended(tag COLLATE "C", 'storied.positions'::regclass::oid::bigint)
$$;
REVOKE EXECUTE ON FUNCTION storied.tag_key FROM PUBLIC;

-- Takes the shared locks of an append. The limit protects the lock table of the server.
CREATE FUNCTION storied.lock_tags(tags text[]) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    keys CONSTANT bigint[] := ARRAY(SELECT DISTINCT storied.tag_key(t.tag) FROM unnest(tags) AS t (tag) ORDER BY 1);
BEGIN
    IF cardinality(keys) > 64 THEN
        RAISE EXCEPTION 'a transaction has more than 64 tags' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock_shared((k.hash >> 32)::integer, k.hash::bit(32)::integer) FROM unnest(keys) AS k (hash);
END $$;
REVOKE EXECUTE ON FUNCTION storied.lock_tags FROM PUBLIC;

-- Stores tags. With event_id, only those of events that were appended.
CREATE FUNCTION storied.add_tags(
    tag_event  integer[],              -- for each tag: index of its event in the arrays below
    tag_text   text[],
    positions  bigint[],
    event_name integer[],
    event_id   uuid[]                  -- null: all events were appended
) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    guard text;                        -- of tags_are_appended
BEGIN
    IF NOT coalesce(
        cardinality(tag_event) = cardinality(tag_text) AND 1 <= ALL (tag_event) AND cardinality(event_name) >= ALL (tag_event), false) THEN
        RAISE EXCEPTION 'tags and events do not fit together' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    guard := set_config('storied_log.appending', 'on', true);
    INSERT INTO storied.tags (tag, position, name)
    SELECT t.tag, positions[t.event], event_name[t.event]
    FROM unnest(tag_event, tag_text) AS t (event, tag)
    WHERE event_id IS NULL OR event_id[t.event] = (
        SELECT e.id FROM storied.events AS e
        WHERE e.position >= positions[t.event] AND e.position <= positions[t.event] ORDER BY e.position LIMIT 1);
    guard := set_config('storied_log.appending', 'off', true);
END $$;
REVOKE EXECUTE ON FUNCTION storied.add_tags FROM PUBLIC;

-- Like storied.append(), for events with tags.
CREATE FUNCTION storied.append_tagged(
    known_server     bigint,           -- these as in storied.append
    known_position   bigint,
    part_stream      bigint[],
    part_category    integer[],
    part_stream_id   text[],
    part_unit        integer[],
    part_expected    bigint[],
    part_events      integer[],
    look_up          boolean,
    used_names       integer[],
    event_name       integer[],
    event_id         uuid[],
    event_command_id uuid[],
    event_payload    bytea[],
    event_metadata   bytea[],
    settle           boolean,
    event_correlation uuid[],
    tag_event        integer[],        -- for each tag: number of its event, from 1
    tag_text         text[],           -- each tag of an event once
    OUT streams   bigint[],
    OUT versions  bigint[],
    OUT lost      boolean[],
    OUT positions bigint[],
    OUT transaction_id text,
    OUT settled   bigint[]
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
BEGIN
    PERFORM storied.lock_tags(tag_text);
    SELECT a.streams, a.versions, a.lost, a.positions, a.transaction_id, a.settled
    INTO streams, versions, lost, positions, transaction_id, settled
    FROM storied.append(
        known_server, known_position, part_stream, part_category, part_stream_id, part_unit, part_expected, part_events, look_up,
        used_names, event_name, event_id, event_command_id, event_payload, event_metadata, settle, event_correlation) AS a;
    IF positions IS NOT NULL THEN
        PERFORM storied.add_tags(
            tag_event, tag_text, positions, event_name, CASE WHEN look_up OR lost IS NOT NULL THEN event_id END);
    END IF;
END $$;
REVOKE EXECUTE ON FUNCTION storied.append_tagged FROM PUBLIC;

-- Like storied.append_known(), for events with tags.
CREATE FUNCTION storied.append_known_tagged(
    known_server     bigint,           -- these as in storied.append_known
    known_position   bigint,
    used_names       integer[],
    event_stream     bigint[],
    event_expected   bigint[],
    event_category   integer[],
    event_name       integer[],
    event_id         uuid[],
    event_command_id uuid[],
    event_payload    bytea[],
    event_metadata   bytea[],
    event_correlation uuid[],
    tag_event        integer[],        -- these as in storied.append_tagged
    tag_text         text[]
) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    positions bigint[];
BEGIN
    PERFORM storied.lock_tags(tag_text);
    positions := storied.append_known(
        known_server, known_position, used_names, event_stream, event_expected, event_category, event_name,
        event_id, event_command_id, event_payload, event_metadata, event_correlation);
    IF positions IS NOT NULL THEN
        PERFORM storied.add_tags(tag_event, tag_text, positions, event_name, NULL);
    END IF;
    RETURN positions;
END $$;
REVOKE EXECUTE ON FUNCTION storied.append_known_tagged FROM PUBLIC;

-- Like storied.append_one(), for an event with tags.
CREATE FUNCTION storied.append_one_tagged(
    known_server     bigint,           -- these as in storied.append_one
    known_position   bigint,
    event_stream     bigint,
    event_stream_id  text,
    event_expected   bigint,
    event_category   integer,
    event_name       integer,
    event_id         uuid,
    event_command_id uuid,
    event_payload    bytea,
    event_metadata   bytea,
    settle           boolean,
    event_correlation uuid,
    tag_text         text[]            -- each tag once
) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    appended bigint[];
    guard    text;                     -- as in storied.add_tags
BEGIN
    PERFORM storied.lock_tags(tag_text);
    appended := storied.append_one(
        known_server, known_position, event_stream, event_stream_id, event_expected, event_category, event_name,
        event_id, event_command_id, event_payload, event_metadata, settle, event_correlation);
    IF appended IS NOT NULL THEN
        guard := set_config('storied_log.appending', 'on', true);
        INSERT INTO storied.tags (tag, position, name)
        SELECT t.tag, appended[2], event_name FROM unnest(tag_text) AS t (tag);
        guard := set_config('storied_log.appending', 'off', true);
    END IF;
    RETURN appended;
END $$;
REVOKE EXECUTE ON FUNCTION storied.append_one_tagged FROM PUBLIC;

-- Returns the positions of events that match a query: at most so many of each item after a position, in
-- the order of the log. An event that matches several items is returned for each of them.
--
-- Every look-up has one possible index, whatever the statistics say. The other tags are compared in a
-- subquery for one value: EXISTS may become a join, which reads the whole index.
CREATE FUNCTION storied.matching(
    item_tag       text[],             -- for each item: the tag by which its events are found
    more_item      integer[],          -- for each further tag of an item: number of the item, from 1 …
    more_tag       text[],             -- … and the tag
    name_item      integer[],          -- for each name of an item: number of the item, from 1 …
    name_text      text[],             -- … and the name; an item without names matches all names
    after_position bigint,
    most           bigint
) RETURNS SETOF bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    first_tag text;
    others    text[];
    numbers   integer[];               -- of the names; null for a name that no event has
BEGIN
    FOR n IN 1 .. cardinality(item_tag) LOOP
        first_tag := item_tag[n];
        others := ARRAY(SELECT m.tag FROM unnest(more_item, more_tag) AS m (item, tag) WHERE m.item = n);
        numbers := CASE WHEN n = ANY (name_item) THEN ARRAY(
            SELECT (SELECT k.number FROM storied.names AS k WHERE k.name = w.name)
            FROM unnest(name_item, name_text) AS w (item, name) WHERE w.item = n) END;
        RETURN QUERY
            SELECT t.position FROM storied.tags AS t
            WHERE t.tag = first_tag AND t.position > after_position AND (numbers IS NULL OR t.name = ANY (numbers))
                AND (cardinality(others) = 0 OR (
                    SELECT bool_and((
                        SELECT true FROM storied.tags AS x WHERE x.tag = o.tag AND x.position = t.position) IS NOT NULL)
                    FROM unnest(others) AS o (tag)))
            ORDER BY t.position LIMIT most;
    END LOOP;
END $$;
REVOKE EXECUTE ON FUNCTION storied.matching FROM PUBLIC;

-- Appends a unit unless an event crosses the boundary of a decision (I13): one that matches its query,
-- is above its mark and was not seen. The call is a transaction of its own.
--
-- No crossing event is missed. Its transaction has a shared lock on each tag of the event until its end,
-- so on a tag of the matching item that is locked here exclusively:
-- - A transaction that had its lock before this one got its own has ended, and the look-up sees its
--   events, because its snapshot is taken after the locks.
-- - Any other one gets its lock after the end of this one, and adds its events after these.
-- - Events at or below the mark were decided before the decision read them, so it saw all of them.
--
-- The function never waits long while appends of others wait for its locks: if a tag is locked by
-- another transaction, or a lock of storied.append() is not granted in time, it is busy and has done
-- nothing.
CREATE FUNCTION storied.append_unless(
    known_server     bigint,           -- these as in storied.append_tagged; there may be no tags
    known_position   bigint,
    part_stream      bigint[],
    part_category    integer[],
    part_stream_id   text[],
    part_unit        integer[],
    part_expected    bigint[],
    part_events      integer[],
    look_up          boolean,
    used_names       integer[],
    event_name       integer[],
    event_id         uuid[],
    event_command_id uuid[],
    event_payload    bytea[],
    event_metadata   bytea[],
    settle           boolean,
    event_correlation uuid[],
    tag_event        integer[],
    tag_text         text[],
    item_tag         text[],           -- the query, as in storied.matching
    more_item        integer[],
    more_tag         text[],
    name_item        integer[],
    name_text        text[],
    mark             bigint,
    seen             bigint[],         -- positions above the mark
    may_wait         boolean,          -- whether to wait for tags, at most for 50 ms
    OUT streams   bigint[],
    OUT versions  bigint[],
    OUT lost      boolean[],
    OUT positions bigint[],
    OUT transaction_id text,
    OUT settled   bigint[],
    OUT crossed   bigint,              -- position of the first event that crosses the boundary: nothing was done
    OUT busy      boolean              -- nothing was done
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    give_up  CONSTANT timestamptz := clock_timestamp() + interval '50 milliseconds';
    wanted   record;
    key_high integer;
    key_low  integer;
    left_ms  integer;
    setting  text;
BEGIN
    busy := false;
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'a standby does not see the locks of the primary' USING ERRCODE = 'read_only_sql_transaction';
    END IF;
    -- Otherwise the look-up would not see what was committed while the function waited.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'appending needs the isolation level read committed, not %', current_setting('transaction_isolation')
            USING ERRCODE = 'ST002';
    END IF;
    IF known_server IS DISTINCT FROM storied.server() THEN
        RETURN;
    END IF;
    IF num_nulls(tag_text, item_tag, more_item, more_tag, name_item, name_text, mark, seen, may_wait) > 0 THEN
        RAISE EXCEPTION 'the condition is incomplete' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- With a pooler, the client commits in a round trip of its own. If it is paused before, its locks
    -- must not stop others.
    setting := set_config('idle_in_transaction_session_timeout', '1000', true);

    BEGIN
        FOR wanted IN
            SELECT k.hash, bool_or(k.is_exclusive) AS is_exclusive
            FROM (
                SELECT storied.tag_key(i.tag) AS hash, true AS is_exclusive FROM unnest(item_tag) AS i (tag)
                UNION ALL
                SELECT storied.tag_key(t.tag), false FROM unnest(tag_text) AS t (tag)
            ) AS k
            GROUP BY k.hash ORDER BY k.hash
        LOOP
            key_high := (wanted.hash >> 32)::integer;
            key_low := wanted.hash::bit(32)::integer;
            CONTINUE WHEN CASE WHEN wanted.is_exclusive
                THEN pg_try_advisory_xact_lock(key_high, key_low) ELSE pg_try_advisory_xact_lock_shared(key_high, key_low) END;
            left_ms := ceil(extract(epoch FROM give_up - clock_timestamp()) * 1000);
            IF NOT may_wait OR left_ms < 1 THEN
                busy := true;
                RETURN;
            END IF;
            setting := set_config('lock_timeout', left_ms::text, true);
            IF wanted.is_exclusive THEN
                PERFORM pg_advisory_xact_lock(key_high, key_low);
            ELSE
                PERFORM pg_advisory_xact_lock_shared(key_high, key_low);
            END IF;
        END LOOP;
        setting := set_config('lock_timeout', '50', true);

        -- A statement of its own, so that its snapshot is newer than the locks. The first event of an
        -- item that is missing in seen is among so many of its events.
        SELECT min(m.position) INTO crossed
        FROM storied.matching(item_tag, more_item, more_tag, name_item, name_text, mark, cardinality(seen) + 1) AS m (position)
        WHERE m.position <> ALL (seen);
        IF crossed IS NOT NULL THEN
            RETURN;
        END IF;

        SELECT a.streams, a.versions, a.lost, a.positions, a.transaction_id, a.settled
        INTO streams, versions, lost, positions, transaction_id, settled
        FROM storied.append(
            known_server, known_position, part_stream, part_category, part_stream_id, part_unit, part_expected, part_events, look_up,
            used_names, event_name, event_id, event_command_id, event_payload, event_metadata, settle, event_correlation) AS a;
        IF positions IS NOT NULL AND cardinality(tag_text) > 0 THEN
            PERFORM storied.add_tags(
                tag_event, tag_text, positions, event_name, CASE WHEN look_up OR lost IS NOT NULL THEN event_id END);
        END IF;
    EXCEPTION WHEN lock_not_available THEN
        busy := true;
    END;
END $$;
REVOKE EXECUTE ON FUNCTION storied.append_unless FROM PUBLIC;

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
    command_categories text[],
    command_stream_ids text[],
    command_ids        uuid[]
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
    FROM (
        SELECT i.n, i.id, (
            SELECT s.number FROM storied.streams AS s
            WHERE s.stream_id = i.stream_id AND s.category = (SELECT k.number FROM storied.names AS k WHERE k.name = i.category)) AS stream
        FROM unnest(command_categories, command_stream_ids, command_ids) WITH ORDINALITY AS i (category, stream_id, id, n)
        OFFSET 0
    ) AS c
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
        RAISE EXCEPTION 'events and tags are appended by %.append() only: what is inserted past it would be missed by readers',
            TG_TABLE_SCHEMA USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER events_are_appended BEFORE INSERT ON storied.events
    FOR EACH STATEMENT EXECUTE FUNCTION storied.refuse_insert();
CREATE TRIGGER tags_are_appended BEFORE INSERT ON storied.tags
    FOR EACH STATEMENT EXECUTE FUNCTION storied.refuse_insert();

CREATE FUNCTION storied.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the log is append-only: write a new event instead of changing an old one'
        USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER events_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON storied.events
    FOR EACH STATEMENT EXECUTE FUNCTION storied.refuse_change();

CREATE TRIGGER names_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON storied.names
    FOR EACH STATEMENT EXECUTE FUNCTION storied.refuse_change();
CREATE TRIGGER streams_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON storied.streams
    FOR EACH STATEMENT EXECUTE FUNCTION storied.refuse_change();
CREATE TRIGGER correlations_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON storied.correlations
    FOR EACH STATEMENT EXECUTE FUNCTION storied.refuse_change();
CREATE TRIGGER tags_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON storied.tags
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

-- Timers: wake-ups of the instances of processes.
CREATE TABLE storied.timers (
    process  text        NOT NULL COLLATE "C",
    instance text        NOT NULL COLLATE "C",
    name     text        NOT NULL COLLATE "C",                   -- empty: the resumption of the instance itself
    version  bigint      NOT NULL CHECK (version >= 0),          -- a lower version never replaces a higher one
    due_at   timestamptz NOT NULL
        CHECK (due_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00'),
    PRIMARY KEY (process, instance, name)
);
-- Each statement has one possible index, whatever the statistics say: the primary key does not fit the
-- collation of look-ups by due time, and other statements do not contain the condition, which is true
-- for every row. Both collations compare bytes.
CREATE INDEX timers_by_due ON storied.timers (process COLLATE ucs_basic, due_at, instance, name) WHERE version >= 0;
-- Timers come and go at the lower end of the index: dead rows there would slow down each look-up of
-- due timers.
ALTER TABLE storied.timers SET (autovacuum_vacuum_scale_factor = 0.02);

-- Changes timers of a process, and returns the number of changed rows. The arrays have an element for
-- each timer: the highest version that is removed, and the version and due time that are put, each
-- null if there is none. The due time is a time, or microseconds after the clock.
CREATE FUNCTION storied.write_timers(
    of_process       text,
    instances        text[],
    timer_names      text[],
    removed_versions bigint[],
    put_versions     bigint[],
    due_times        timestamptz[],
    due_after        bigint[]
) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    started CONSTANT timestamptz := clock_timestamp();
    changed bigint := 0;
    affected bigint;
    change  record;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: timers would be reported before they are durable' USING ERRCODE = 'ST002';
    END IF;
    -- Sorted, so that calls with common timers wait in the same order.
    FOR change IN
        SELECT * FROM unnest(instances, timer_names, removed_versions, put_versions, due_times, due_after)
            AS c (instance, name, removed, put, due_time, due_after)
        ORDER BY c.instance COLLATE "C", c.name COLLATE "C"
    LOOP
        IF change.removed IS NOT NULL THEN
            DELETE FROM storied.timers AS t
            WHERE t.process = of_process AND t.instance = change.instance AND t.name = change.name
                AND t.version <= change.removed;
            GET DIAGNOSTICS affected = ROW_COUNT;
            changed := changed + affected;
        END IF;
        IF change.put IS NOT NULL THEN
            INSERT INTO storied.timers AS t (process, instance, name, version, due_at)
            VALUES (of_process, change.instance, change.name, change.put,
                coalesce(change.due_time, started + change.due_after * interval '1 microsecond'))
            ON CONFLICT (process, instance, name) DO UPDATE SET version = excluded.version, due_at = excluded.due_at
            WHERE t.version < excluded.version OR t.version = excluded.version AND t.name = '';
            GET DIAGNOSTICS affected = ROW_COUNT;
            changed := changed + affected;
        END IF;
    END LOOP;
    RETURN changed;
END $$;
REVOKE EXECUTE ON FUNCTION storied.write_timers FROM PUBLIC;

-- Scheduled commands: commands that are executed when they are due.
CREATE TABLE storied.scheduled_commands (
    id       uuid        PRIMARY KEY,                            -- id of the command
    target   text        NOT NULL COLLATE "C" CHECK (octet_length(target) > 0), -- in clear: category/id, or the name of a handler
    body     bytea       NOT NULL,                               -- encoded command
    due_at   timestamptz NOT NULL
        CHECK (due_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00'),
    schedule text        COLLATE "C",                            -- recurring schedule of which the command is a tick
    state    text        NOT NULL COLLATE "C" CHECK (state IN ('parked', 'started', 'waiting')),
    reason   text                                                -- reason for parking
);
-- Each statement has one possible index, whatever the statistics say: only look-ups by due time contain
-- the condition on the target, which is true for every row, and only those of a schedule compare it.
CREATE INDEX scheduled_commands_by_due ON storied.scheduled_commands (state, due_at, id) WHERE octet_length(target) > 0;
CREATE INDEX scheduled_commands_by_schedule ON storied.scheduled_commands (schedule, state, due_at, id) WHERE schedule IS NOT NULL;
-- Commands come and go at the lower end of the index, as timers do.
ALTER TABLE storied.scheduled_commands SET (autovacuum_vacuum_scale_factor = 0.02);

-- Recurring schedules.
CREATE TABLE storied.schedules (
    name       text   NOT NULL COLLATE "C" PRIMARY KEY,
    definition bytea  NOT NULL,
    revision   bigint NOT NULL CHECK (revision >= 0),            -- number of writes: 1, 2, 3 …
    next_at    timestamptz                                       -- next tick; null: paused or ended
        CHECK (next_at BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00')
);
CREATE INDEX schedules_by_next ON storied.schedules (next_at, name) WHERE revision >= 0;

-- Stores commands, and returns the stored ones, each with the number that the call has added. The
-- due time is a time, or microseconds after the clock.
CREATE FUNCTION storied.schedule_commands(
    command_ids uuid[],
    targets     text[],
    bodies      bytea[],
    due_times   timestamptz[],
    due_after   bigint[],
    of_schedules text[]
) RETURNS TABLE (
    command_id uuid, command_target text, command_body bytea, command_due_at timestamptz, command_schedule text,
    command_state text, command_reason text, added bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    started CONSTANT timestamptz := clock_timestamp();
    new_rows bigint;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: scheduled commands would be reported before they are durable' USING ERRCODE = 'ST002';
    END IF;
    -- Sorted, so that calls with common commands wait in the same order. An existing command is locked
    -- and not changed: it cannot end between this statement and the next one.
    INSERT INTO storied.scheduled_commands AS c (id, target, body, due_at, schedule, state)
    SELECT n.id, n.target, n.body, coalesce(n.due_time, started + n.due_after * interval '1 microsecond'), n.schedule, 'waiting'
    FROM unnest(command_ids, targets, bodies, due_times, schedule_commands.due_after, of_schedules)
        AS n (id, target, body, due_time, due_after, schedule)
    ORDER BY n.id
    ON CONFLICT (id) DO UPDATE SET state = c.state WHERE false;
    GET DIAGNOSTICS new_rows = ROW_COUNT;
    RETURN QUERY
        SELECT c.id, c.target, c.body, c.due_at, c.schedule, c.state, c.reason, new_rows
        FROM storied.scheduled_commands AS c WHERE c.id = ANY(command_ids);
END $$;
REVOKE EXECUTE ON FUNCTION storied.schedule_commands FROM PUBLIC;

-- Starts due commands, the oldest first: at most so many, and no more after so many bytes of bodies.
-- Returns them, and a last row without a command: with the clock, and the due time of the earliest
-- command that waits.
CREATE FUNCTION storied.start_due_commands(
    most       bigint,
    most_bytes bigint
) RETURNS TABLE (
    command_id uuid, command_target text, command_body bytea, command_due_at timestamptz, command_schedule text,
    clock timestamptz, next_due_at timestamptz)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    started CONSTANT timestamptz := clock_timestamp();
    locked  bigint;                        -- number of due commands that no other call has locked
    picked  uuid[];                        -- those that are started
    next_at timestamptz;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: scheduled commands would be reported before they are durable' USING ERRCODE = 'ST002';
    END IF;
    -- A command that another call starts is skipped, so no two calls start it and none waits.
    SELECT array_agg(d.id) FILTER (WHERE d.bytes_before < most_bytes), count(*) INTO picked, locked
    FROM (
        SELECT l.id, sum(l.bytes) OVER (ORDER BY l.due_at, l.id ROWS UNBOUNDED PRECEDING) - l.bytes AS bytes_before
        FROM (
            SELECT c.id, c.due_at, octet_length(c.body) AS bytes FROM storied.scheduled_commands AS c
            WHERE c.state = 'waiting' AND c.due_at <= started AND octet_length(c.target) > 0
            ORDER BY c.due_at, c.id LIMIT most FOR UPDATE SKIP LOCKED
        ) AS l
    ) AS d;
    IF picked IS NOT NULL THEN
        RETURN QUERY
            UPDATE storied.scheduled_commands AS c SET state = 'started' WHERE c.id = ANY(picked)
            RETURNING c.id, c.target, c.body, c.due_at, c.schedule, NULL::timestamptz, NULL::timestamptz;
    END IF;
    next_at := (
        SELECT c.due_at FROM storied.scheduled_commands AS c
        WHERE c.state = 'waiting' AND octet_length(c.target) > 0 ORDER BY c.due_at, c.id LIMIT 1);
    -- The rest of the due commands is locked by other calls, which start them or fail: a call at once
    -- would start none.
    IF next_at <= started AND locked < most AND locked = coalesce(cardinality(picked), 0) THEN
        next_at := least(started + interval '1 second', (
            SELECT c.due_at FROM storied.scheduled_commands AS c
            WHERE c.state = 'waiting' AND c.due_at > started AND octet_length(c.target) > 0
            ORDER BY c.due_at, c.id LIMIT 1));
    END IF;
    RETURN QUERY SELECT NULL::uuid, NULL::text, NULL::bytea, NULL::timestamptz, NULL::text, started, next_at;
END $$;
REVOKE EXECUTE ON FUNCTION storied.start_due_commands FROM PUBLIC;

-- Ends commands, and returns the number of changed rows. With a wait, a started command waits again, for
-- as many microseconds. With a reason, it is parked. Without either it is deleted, also if it is parked.
-- With a lease, commands wait or are parked only if the stored lease has the same owner and epoch.
CREATE FUNCTION storied.end_commands(
    command_ids uuid[],
    reasons     text[],
    waits       bigint[],
    of_lease    text,
    of_owner    uuid,
    of_epoch    bigint
) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    changed  bigint := 0;
    affected bigint;
    ended    record;
    is_stale boolean := false;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: scheduled commands would be reported before they are durable' USING ERRCODE = 'ST002';
    END IF;
    IF of_lease IS NOT NULL AND (num_nulls(VARIADIC reasons) < cardinality(reasons) OR num_nulls(VARIADIC waits) < cardinality(waits)) THEN
        -- The lock makes a takeover wait until the ends are committed.
        PERFORM 1 FROM storied.leases AS l
        WHERE l.name = of_lease AND l.owner = of_owner AND l.epoch = of_epoch
        FOR SHARE;
        is_stale := NOT FOUND;
    END IF;
    -- Sorted, so that calls with common commands wait in the same order.
    FOR ended IN SELECT * FROM unnest(command_ids, reasons, waits) AS e (id, reason, wait) ORDER BY e.id LOOP
        CONTINUE WHEN is_stale AND (ended.wait IS NOT NULL OR ended.reason IS NOT NULL);
        IF ended.wait IS NOT NULL THEN
            UPDATE storied.scheduled_commands AS c
            SET state = 'waiting', due_at = clock_timestamp() + ended.wait * interval '1 microsecond'
            WHERE c.id = ended.id AND c.state = 'started';
        ELSIF ended.reason IS NULL THEN
            DELETE FROM storied.scheduled_commands AS c WHERE c.id = ended.id AND c.state <> 'waiting';
        ELSE
            UPDATE storied.scheduled_commands AS c SET state = 'parked', reason = ended.reason
            WHERE c.id = ended.id AND c.state = 'started';
        END IF;
        GET DIAGNOSTICS affected = ROW_COUNT;
        changed := changed + affected;
    END LOOP;
    RETURN changed;
END $$;
REVOKE EXECUTE ON FUNCTION storied.end_commands FROM PUBLIC;

-- Deletes a command unless it is started, and returns it as it was before.
CREATE FUNCTION storied.cancel_command(command_id uuid) RETURNS SETOF storied.scheduled_commands
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    stored storied.scheduled_commands%ROWTYPE;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: scheduled commands would be reported before they are durable' USING ERRCODE = 'ST002';
    END IF;
    -- The lock waits for a call that starts the command, and then shows its state.
    SELECT c.* INTO stored FROM storied.scheduled_commands AS c WHERE c.id = command_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    IF stored.state <> 'started' THEN
        DELETE FROM storied.scheduled_commands AS c WHERE c.id = command_id;
    END IF;
    RETURN NEXT stored;
END $$;
REVOKE EXECUTE ON FUNCTION storied.cancel_command FROM PUBLIC;

-- Makes a parked command due now, and returns it as it was before.
CREATE FUNCTION storied.retry_command(command_id uuid) RETURNS SETOF storied.scheduled_commands
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    stored storied.scheduled_commands%ROWTYPE;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: scheduled commands would be reported before they are durable' USING ERRCODE = 'ST002';
    END IF;
    SELECT c.* INTO stored FROM storied.scheduled_commands AS c WHERE c.id = command_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    IF stored.state = 'parked' THEN
        UPDATE storied.scheduled_commands AS c SET state = 'waiting', due_at = clock_timestamp(), reason = NULL
        WHERE c.id = command_id;
    END IF;
    RETURN NEXT stored;
END $$;
REVOKE EXECUTE ON FUNCTION storied.retry_command FROM PUBLIC;

-- Writes a revision of a schedule after the one before, together with commands. Returns whether it
-- was written; if not, nothing was.
CREATE FUNCTION storied.write_schedule(
    of_name        text,
    new_definition bytea,
    new_revision   bigint,
    new_next_at    timestamptz,
    command_ids    uuid[],
    targets        text[],
    bodies         bytea[],
    due_times      timestamptz[],
    due_after      bigint[],
    of_schedules   text[]
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    affected bigint;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: schedules would be reported before they are durable' USING ERRCODE = 'ST002';
    END IF;
    IF new_revision = 1 THEN
        INSERT INTO storied.schedules (name, definition, revision, next_at)
        VALUES (of_name, new_definition, new_revision, new_next_at) ON CONFLICT (name) DO NOTHING;
    ELSE
        UPDATE storied.schedules AS s SET definition = new_definition, revision = new_revision, next_at = new_next_at
        WHERE s.name = of_name AND s.revision = new_revision - 1;
    END IF;
    GET DIAGNOSTICS affected = ROW_COUNT;
    IF affected = 0 THEN
        RETURN false;
    END IF;
    IF cardinality(command_ids) > 0 THEN
        PERFORM FROM storied.schedule_commands(command_ids, targets, bodies, due_times, due_after, of_schedules);
    END IF;
    RETURN true;
END $$;
REVOKE EXECUTE ON FUNCTION storied.write_schedule FROM PUBLIC;

-- Removes a revision of a schedule, together with its waiting commands. Returns whether it was stored.
CREATE FUNCTION storied.remove_schedule(of_name text, of_revision bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    waiting uuid[];
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        RAISE EXCEPTION 'synchronous_commit is off: schedules would be reported before they are durable' USING ERRCODE = 'ST002';
    END IF;
    DELETE FROM storied.schedules AS s WHERE s.name = of_name AND s.revision = of_revision;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    waiting := ARRAY(
        SELECT c.id FROM storied.scheduled_commands AS c WHERE c.schedule = of_name AND c.state = 'waiting');
    -- Sorted, so that calls with common commands wait in the same order. The lock waits for a call that
    -- starts a command, which then stays.
    DELETE FROM storied.scheduled_commands AS c WHERE c.id = ANY(ARRAY(
        SELECT w.id FROM storied.scheduled_commands AS w
        WHERE w.id = ANY(waiting) AND w.state = 'waiting' ORDER BY w.id FOR UPDATE));
    RETURN true;
END $$;
REVOKE EXECUTE ON FUNCTION storied.remove_schedule FROM PUBLIC;
