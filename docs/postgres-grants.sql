-- The rights that suffice, for a schema called storied. Run them as the login that migrated, after the first migration, and
-- again after each later one. None of them allows to insert, change or delete events, draw or set positions, or change storied's tables.

-- A program: runs a Runtime with PostgresOptions::migrate(false). Events go in through storied.append() and storied.append_one(),
-- which run with the rights of their owner and check what they are given.
GRANT USAGE ON SCHEMA storied TO shop;
GRANT SELECT ON storied.events, storied.positions, storied.meta TO shop;
GRANT SELECT ON storied.migrations, storied.read_model_migrations TO shop;
GRANT EXECUTE ON FUNCTION storied.append, storied.append_one TO shop;
GRANT EXECUTE ON FUNCTION storied.frontier, storied.command_events, storied.stream_key TO shop;
GRANT SELECT, INSERT, UPDATE ON storied.leases, storied.snapshots, storied.checkpoints TO shop;
GRANT SELECT, INSERT, UPDATE, DELETE ON storied.parked TO shop;
GRANT SELECT, INSERT, DELETE ON storied.paused, storied.commands TO shop;
GRANT UPDATE (recorded_at) ON storied.commands TO shop;  -- to lock records that are about to be forgotten

-- A reader: the tool's commands that change nothing, and programs that read the log.
GRANT USAGE ON SCHEMA storied TO shop_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA storied TO shop_reader;
GRANT SELECT ON storied.positions TO shop_reader;
GRANT EXECUTE ON FUNCTION storied.frontier, storied.stream_key TO shop_reader;

-- A read model in another database: the login of PostgresReadModel, once the tables of that schema are there. The tables of the
-- read model itself are yours to grant.
GRANT USAGE ON SCHEMA storied TO shop_view;
GRANT SELECT ON storied.read_model_migrations TO shop_view;
GRANT SELECT, INSERT, UPDATE ON storied.checkpoints TO shop_view;
GRANT SELECT, INSERT, UPDATE, DELETE ON storied.parked TO shop_view;

-- Optional, granted by a superuser: status().stall then says what logins of other names are doing.
GRANT pg_read_all_stats TO shop, shop_reader;
