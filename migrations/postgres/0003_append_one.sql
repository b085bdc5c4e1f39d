-- storied.append() for what is most frequent: one event that follows a known one, or begins a stream. Half its time, since
-- nothing travels in arrays.
--
-- It rests on the same order: first the lock, then the position, then the look at the event to follow, which must be there
-- with a smaller position. It answers null, and has changed nothing, when the event cannot have that version; how the stream
-- stands then is for storied.append() to say.
--
-- Where nobody else is appending, it can say how far the log may be read as soon as it is committed, which spares those who
-- wait for the event the question (storied.frontier()). Whoever has drawn a lower position has taken the low-water lock
-- before, and holds it until its transaction ends. So when, behind the draw, nobody else has one, everything below is
-- decided, and the statement after that look sees all of it.
CREATE FUNCTION storied.append_one(
    event_stream     uuid,
    event_expected   bigint,           -- version of the event that it follows, 0 to begin the stream
    event_category   text,
    event_stream_id  text,
    event_name       text,
    event_id         uuid,
    event_command_id uuid,
    event_payload    bytea,
    event_metadata   bytea,
    tell             boolean           -- whether to look if it is alone
) RETURNS bigint[]                     -- its position; when it is alone, the position of the event before it in the log (0: it is
                                       -- the first), and when it was recorded, in microseconds since 1970
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET storied_log.appending = 'on'
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    drawn    bigint;
    recorded timestamptz;
    alone    boolean;
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

    INSERT INTO storied.events AS target
        (position, version, stream, id, command_id, category, stream_id, name, payload, metadata)
    SELECT drawn, event_expected + 1, event_stream,
        event_id, event_command_id, event_category, event_stream_id, event_name, event_payload, event_metadata
    WHERE event_expected = 0 OR (
        SELECT e.position < drawn AND e.category = event_category AND e.stream_id = event_stream_id
        FROM storied.events AS e
        WHERE e.stream = event_stream AND e.version >= event_expected AND e.version <= event_expected
        ORDER BY e.version LIMIT 1) -- a range with an order, which the index by command does not have
    ON CONFLICT (stream, version) DO NOTHING
    RETURNING target.recorded_at INTO recorded;

    IF recorded IS NULL THEN
        RETURN NULL;
    END IF;
    -- Behind the draw, and before the look at the log.
    alone := tell AND NOT EXISTS (
        SELECT FROM pg_locks AS l
        WHERE l.locktype = 'advisory' AND l.objsubid = 1
            AND (l.classid::bigint >> 12) = ('storied.positions'::regclass::oid::bigint & 1048575)
            AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND l.pid IS DISTINCT FROM pg_backend_pid()); -- prepared transactions have none
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
