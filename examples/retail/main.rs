//! Replays the invoices of a real business through storied. `--help` says how.

mod args;
mod domain;
mod import;
mod projections;
mod report;
mod rows;

use std::path::Path;
use std::process::ExitCode;

use storied::store::SqliteStore;
use storied::{EventStore, Position, ReadLog, Runtime, StoreError};

use self::args::{Args, USAGE};
use self::domain::Invoice;
use self::report::{Progress, Report};
use self::rows::Rows;

#[tokio::main]
async fn main() -> ExitCode {
    let args = match Args::parse(std::env::args_os().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("{error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let rows = Rows::open(&args.input)?;
    let runtime =
        Runtime::builder().store(SqliteStore::open(&args.db).await?).aggregate::<Invoice>().start().await?;
    let mut progress = Progress::new();
    let (tally, result) = import::import(&runtime, rows, &mut progress).await;
    let took = progress.done();
    eprintln!("{:?}", runtime.status().await.writer);
    let events = count(&**runtime.store()).await?;
    result?;
    let report = Report::new(&tally, events, Default::default(), took);
    report.write_text(&mut std::io::stdout())?;
    runtime.shutdown().await?;
    Ok(())
}

async fn count(store: &dyn EventStore) -> Result<u64, StoreError> {
    let mut n = 0;
    let mut after = Position::START;
    loop {
        let page = store.read_log(ReadLog::after(after)).await?;
        n += page.events.len() as u64;
        if page.events.is_empty() {
            return Ok(n);
        };
        after = page.events.last().unwrap().position;
    }
}
