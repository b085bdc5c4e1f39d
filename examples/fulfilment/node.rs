//! Runtimes with the process and without, and the node processes of a run.

use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use storied::command::{CommandBus, HandlerOptions, NatsCommandOptions};
use storied::runtime::Builder;
use storied::{MemoryStore, NatsOptions, PostgresOptions, ProcessOptions, Runtime, SqliteStore};

use crate::Failure;
use crate::args::{Args, StoreKind};
use crate::domain::{Fulfilment, Order, Payment, Payments, Stock};

/// The schema of the log in PostgreSQL.
const SCHEMA: &str = "storied_fulfilment";

/// Maximum number of concurrent payments on a node.
const WORKERS: usize = 64;

/// Validity of the owner's lease. Short, so that faults cause many takeovers.
const LEASE: Duration = Duration::from_secs(2);

fn nats(args: &Args, options: NatsOptions) -> Result<NatsOptions, Failure> {
    let options = options.namespace(&args.namespace).reconnect_wait(Duration::from_millis(500));
    Ok(match &args.nats_url {
        Some(url) => options.url(url),
        None => options,
    })
}

/// Returns a builder of a runtime without aggregates.
async fn builder(args: &Args, name: &str) -> Result<Builder, Failure> {
    let builder = match args.store {
        StoreKind::Memory => Runtime::builder().store(MemoryStore::new()),
        StoreKind::Sqlite => Runtime::builder().store(SqliteStore::open(&args.db).await?),
        StoreKind::Postgres => {
            let options =
                PostgresOptions::new().schema(SCHEMA).application_name(format!("fulfilment {name}"));
            let options = match &args.database_url {
                Some(url) => options.url(url),
                None => options,
            };
            Runtime::builder().store(options.connect().await?)
        }
    };
    if args.nodes == 0 && args.node.is_none() {
        return Ok(builder);
    }
    let commands = NatsCommandOptions::new(nats(args, NatsOptions::core())?).node(name);
    Ok(builder.bus(nats(args, NatsOptions::core())?.bus()).commands(CommandBus::nats(commands)))
}

/// Starts a runtime that runs the process and its targets.
pub(crate) async fn fulfilling(args: &Args, name: &str) -> Result<Runtime, Failure> {
    let builder = builder(args, name).await?;
    let builder = builder.aggregate::<Order>().aggregate::<Stock>().aggregate::<Payment>();
    let builder = builder.handler_with(Payments(args.provider), HandlerOptions::new().workers(WORKERS));
    Ok(builder.process_with::<Fulfilment>(ProcessOptions::new().lease(LEASE)).start().await?)
}

/// Starts a runtime that sends commands to other nodes.
pub(crate) async fn ordering(args: &Args) -> Result<Runtime, Failure> {
    Ok(builder(args, "shop").await?.start().await?)
}

/// Runs the process until standard input ends, at the latest with the parent process.
pub(crate) async fn serve(args: &Args, name: &str) -> Result<(), Failure> {
    let runtime = fulfilling(args, name).await?;
    writeln!(io::stdout(), "ready")?;
    tokio::task::spawn_blocking(|| io::stdin().read_to_end(&mut Vec::new()))
        .await
        .map_err(io::Error::other)??;
    Ok(runtime.shutdown().await?)
}

/// A node process. Killed when it is dropped.
pub(crate) struct Node {
    pub(crate) name: String,
    args: Args,
    running: Option<(Child, ChildStdin)>,
}

impl Node {
    pub(crate) fn new(args: &Args, number: u64) -> Self {
        Self { name: format!("fulfilment-{number}"), args: args.clone(), running: None }
    }

    /// Starts the process; it prints `ready` when it is ready.
    pub(crate) fn start(&mut self) -> Result<(), Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(self.args.for_node(&self.name))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().ok_or_else(|| io::Error::other("the node has no standard input"))?;
        self.running = Some((child, stdin));
        Ok(())
    }

    /// Waits until the process is ready.
    pub(crate) async fn ready(&mut self) -> Result<(), Failure> {
        let Some((child, _)) = &mut self.running else { return Ok(()) };
        let Some(mut stdout) = child.stdout.take() else { return Ok(()) };
        let read = tokio::task::spawn_blocking(move || {
            let mut ready = [0; 6];
            stdout.read_exact(&mut ready).map(|()| ready)
        });
        match read.await.map_err(io::Error::other)? {
            Ok(ready) if &ready == b"ready\n" => Ok(()),
            other => Err(Failure::Node { name: self.name.clone(), reason: format!("{other:?}") }),
        }
    }

    /// Returns whether it has ended by itself, which is an error.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.running.as_mut().is_some_and(|(child, _)| child.try_wait().is_ok_and(|status| status.is_some()))
    }

    pub(crate) fn kill(&mut self) {
        if let Some((mut child, _)) = self.running.take() {
            // Fails only if the process has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops or continues the process.
    pub(crate) fn pause(&self, pause: bool) {
        if let Some((child, _)) = &self.running {
            let signal = if pause { Signal::SIGSTOP } else { Signal::SIGCONT };
            let _ = kill(Pid::from_raw(child.id().cast_signed()), signal);
        }
    }

    /// Ends it in order.
    pub(crate) async fn stop(mut self) -> Result<(), Failure> {
        let Some((mut child, mut stdin)) = self.running.take() else { return Ok(()) };
        let _ = stdin.flush();
        drop(stdin);
        let status = tokio::task::spawn_blocking(move || child.wait()).await.map_err(io::Error::other)??;
        if status.success() {
            return Ok(());
        }
        Err(Failure::Node { name: self.name.clone(), reason: status.to_string() })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}
