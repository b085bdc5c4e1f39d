//! The command-line tool, run as a program against private servers, with text and JSON output.

mod adoption;
mod nats;
mod processes;
mod program;
mod projections;
mod reading;
mod schedules;
mod terminal;
