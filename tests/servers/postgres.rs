//! The PostgreSQL store on real servers: the suite of all stores, and tests specific to PostgreSQL.

mod bad_input;
mod by_command;
mod by_name;
mod conformance;
mod faults;
mod mark;
mod numbers;
mod oracle;
mod outage;
mod plans;
mod pooler;
mod projections;
mod proxy;
mod queries;
mod read_model;
mod rights;
mod settled;
mod standby;
mod tls;
mod tools;
mod wake;
