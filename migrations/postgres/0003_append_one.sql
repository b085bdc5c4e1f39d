-- Like storied.append(), for the most frequent case: one event that follows a known one, or begins
-- a stream. It takes half the time, because its arguments are not arrays.
--
-- I1: the order is the same: first the lock, then the position, then the look-up of the previous
-- event, which must exist with a lower position. If the event cannot have that version, the
-- function returns null and changes nothing; storied.append() then reports the state of the stream.
--
-- If no other append is in flight, the function also returns how far the log is readable after its
-- commit, which saves waiting readers the call of storied.high_water_mark(). A transaction with a lower
-- position has taken the low-water lock before its draw, and holds it until its end. So if no other
-- transaction holds the lock after the draw, all lower positions are decided, and a later statement
-- sees all of them.
CREATE FUNCTION storied.append_one(
    event_stream     uuid,
    event_expected   bigint,           -- version of the previous event, 0 to begin the stream
    event_category   text,
    event_stream_id  text,
    event_name       text,
    event_id         uuid,
    event_command_id uuid,
    event_payload    bytea,
    event_metadata   bytea,
    tell             boolean           -- whether to check that no other append is in flight
) RETURNS bigint[]                     -- position of the event; if no other append is in flight, also the position before it in
                                       -- the log (0: none), and the time of recording in
                                       -- microseconds since 1970
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    drawn    bigint;
    recorded timestamptz;
    alone    boolean;
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
    IF NOT coalesce(storied.is_name(event_name), false) THEN
        RAISE EXCEPTION 'the event has a name that readers cannot read' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF event_expected = 0 AND NOT storied.is_stream(event_stream, event_category, event_stream_id) THEN
        RAISE EXCEPTION 'the new stream has a key, category or id that readers cannot read'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;

    PERFORM pg_advisory_xact_lock_shared(
        (('storied.positions'::regclass::oid::bigint & 1048575) << 44)
        | coalesce(pg_sequence_last_value('storied.positions'), 0));

    drawn := nextval('storied.positions');

    guard := set_config('storied_log.appending', 'on', true);

    INSERT INTO storied.events AS target
        (position, version, stream, id, command_id, category, stream_id, name, payload, metadata)
    SELECT drawn, event_expected + 1, event_stream,
        event_id, event_command_id, event_category, event_stream_id, event_name, event_payload, event_metadata
    WHERE event_expected = 0 OR (
        SELECT e.position < drawn AND e.category = event_category AND e.stream_id = event_stream_id
        FROM storied.events AS e
        WHERE e.stream = event_stream AND e.version >= event_expected AND e.version <= event_expected
        ORDER BY e.version LIMIT 1) -- a range with an order, which the index by command lacks
    ON CONFLICT (stream, version) DO NOTHING
    RETURNING target.recorded_at INTO recorded;
    guard := set_config('storied_log.appending', 'off', true);

    IF recorded IS NULL THEN
        RETURN NULL;
    END IF;
    -- After the draw, and before the query of the log.
    alone := tell AND NOT EXISTS (
        SELECT FROM pg_locks AS l
        WHERE l.locktype = 'advisory' AND l.objsubid = 1
            AND (l.classid::bigint >> 12) = ('storied.positions'::regclass::oid::bigint & 1048575)
            AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND l.pid IS DISTINCT FROM pg_backend_pid()); -- prepared transactions have no pid
    IF NOT alone THEN
        RETURN ARRAY[drawn];
    END IF;
    RETURN ARRAY[
        drawn,
        coalesce((
            SELECT e.position FROM storied.events AS e
            WHERE e.position < drawn ORDER BY e.position DESC LIMIT 1), 0),
        (extract(epoch FROM recorded) * 1000000)::bigint];
END $$;
REVOKE EXECUTE ON FUNCTION storied.append_one FROM PUBLIC;
