-- The smallest rights, for a schema called storied. Run them as the login that migrated, after the
-- first migration, and again after each later one. They do not allow a login to insert, change or
-- delete events, to draw or set positions, or to change storied's tables.

-- A program: runs a Runtime with PostgresOptions::migrate(false). It appends events through
-- storied.append() and the functions that call it or do its work, which run with the rights of their
-- owner and check their arguments.
GRANT USAGE ON SCHEMA storied TO shop;
GRANT SELECT ON storied.events, storied.streams, storied.names, storied.correlations, storied.tags TO shop;
GRANT SELECT ON storied.positions, storied.meta TO shop;
GRANT SELECT ON storied.migrations, storied.read_model_migrations TO shop;
GRANT EXECUTE ON FUNCTION storied.append, storied.append_known, storied.append_one TO shop;
GRANT EXECUTE ON FUNCTION storied.append_tagged, storied.append_known_tagged, storied.append_one_tagged TO shop;
GRANT EXECUTE ON FUNCTION storied.append_unless, storied.matching, storied.number_names TO shop;
GRANT EXECUTE ON FUNCTION storied.high_water_mark, storied.command_events, storied.stream_number, storied.server TO shop;
GRANT SELECT, INSERT, UPDATE ON storied.leases, storied.snapshots, storied.controls, storied.publisher TO shop;
GRANT SELECT, INSERT, UPDATE ON storied.projections, storied.checkpoints TO shop;
GRANT SELECT, INSERT, UPDATE, DELETE ON storied.parked, storied.requests TO shop;
GRANT SELECT, INSERT, UPDATE, DELETE ON storied.timers TO shop;
GRANT EXECUTE ON FUNCTION storied.write_timers TO shop;
GRANT SELECT, INSERT, UPDATE, DELETE ON storied.scheduled_commands, storied.schedules TO shop;
GRANT EXECUTE ON FUNCTION storied.schedule_commands, storied.start_due_commands, storied.end_commands TO shop;
GRANT EXECUTE ON FUNCTION storied.cancel_command, storied.retry_command TO shop;
GRANT EXECUTE ON FUNCTION storied.write_schedule, storied.remove_schedule TO shop;
GRANT SELECT, INSERT, DELETE ON storied.commands TO shop;
GRANT UPDATE (recorded_at) ON storied.commands TO shop;  -- to lock records that are about to expire

-- A reader: the tool's commands that change nothing, and programs that read the log.
GRANT USAGE ON SCHEMA storied TO shop_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA storied TO shop_reader;
GRANT SELECT ON storied.positions TO shop_reader;
GRANT EXECUTE ON FUNCTION storied.high_water_mark, storied.matching, storied.stream_number, storied.server TO shop_reader;

-- A read model in another database: the login of PostgresReadModel, after the tables of that schema
-- exist. Grant the rights on the tables of the read model itself separately.
GRANT USAGE ON SCHEMA storied TO shop_view;
GRANT SELECT ON storied.read_model_migrations TO shop_view;
GRANT SELECT, INSERT, UPDATE ON storied.projections, storied.checkpoints TO shop_view;
GRANT SELECT, INSERT, UPDATE, DELETE ON storied.parked, storied.requests TO shop_view;

-- Optional, granted by a superuser: status().stall then describes the activity of other logins.
GRANT pg_read_all_stats TO shop, shop_reader;
