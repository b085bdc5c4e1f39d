//! Orders, stock and payments, which stay consistent whichever process is killed.
//!
//! A process manager reserves stock for each line of an order, charges a payment provider, and
//! ships. If a step fails or takes too long, it compensates. See `--help` for the options.

mod args;
mod domain;
mod drive;
mod node;
mod report;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use tokio::time::sleep;
use uuid::Uuid;

use self::args::{Args, USAGE};
use self::node::Node;
use self::report::Report;

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| "error,storied::notice=warn,storied::startup=warn".into()),
        )
        .init();
    let args = match Args::parse(std::env::args_os().skip(1)) {
        Ok(args) if args.help => {
            return match write!(io::stdout(), "{USAGE}") {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("error: writing the output failed: {error}");
                    ExitCode::FAILURE
                }
            };
        }
        Ok(args) => args,
        Err(error) => {
            eprintln!("error: {error}; --help lists the options");
            return ExitCode::from(2);
        }
    };
    let ended = match &args.node {
        Some(name) => node::serve(&args, name).await,
        None => run(&args).await,
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The cause of a failed run.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Store(#[from] storied::StoreError),
    #[error(transparent)]
    Namespace(#[from] storied::event::InvalidName),
    #[error(transparent)]
    Start(#[from] storied::runtime::StartError),
    #[error(transparent)]
    Shutdown(#[from] storied::runtime::ShutdownError),
    #[error(transparent)]
    Event(#[from] storied::DecodeError),
    #[error("node {name}: {reason}")]
    Node { name: String, reason: String },
    #[error("{what} failed: {reason}")]
    Command { what: &'static str, reason: String },
    #[error("the check of the log failed: {}", wrong.join("; "))]
    Wrong { wrong: Vec<String> },
    #[error("internal error: {0}")]
    Bug(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

async fn run(args: &Args) -> Result<(), Failure> {
    let mut nodes = Vec::new();
    let runtime = if args.nodes == 0 {
        node::fulfilling(args, "fulfilment").await?
    } else {
        // This node first, because it prepares the database.
        let runtime = node::ordering(args).await?;
        for number in 1..=args.nodes {
            let mut node = Node::new(args, number);
            node.start()?;
            nodes.push(node);
        }
        for node in &mut nodes {
            node.ready().await?;
        }
        runtime
    };
    drive::stock(&runtime).await?;

    let stop = tokio::sync::watch::Sender::new(false);
    let faults = tokio::spawn(faults(nodes, args.faults, stop.subscribe()));
    let placed = drive::orders(&runtime, args).await;
    stop.send_replace(true);
    let nodes = faults.await.map_err(io::Error::other)??;
    let (orders, started) = placed?;
    drive::ended(&runtime, &orders).await?;
    let took = started.elapsed();

    // A node that was paused may still have stale work, which the check must see.
    for node in nodes {
        node.stop().await?;
    }
    let report = Report::of(&**runtime.store(), took).await?;
    runtime.shutdown().await?;
    if args.json {
        writeln!(io::stdout(), "{}", report.json())?;
    } else {
        writeln!(io::stdout(), "{report}")?;
    }
    report.check()
}

/// Runs the nodes until `stop`; with faults, kills and pauses one after the other.
///
/// All nodes run when it returns.
async fn faults(
    mut nodes: Vec<Node>,
    wanted: bool,
    mut stop: tokio::sync::watch::Receiver<bool>,
) -> Result<Vec<Node>, Failure> {
    let wait = async |stop: &mut tokio::sync::watch::Receiver<bool>, longest: u64| {
        let dice = Uuid::new_v4().as_u128();
        let pause = Duration::from_millis(u64::try_from(dice % u128::from(longest)).unwrap_or(0));
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {}
            () = sleep(pause) => {}
        }
    };
    if !wanted {
        let _ = stop.wait_for(|stop| *stop).await;
    }
    while !*stop.borrow() {
        wait(&mut stop, 1_500).await;
        let dice = Uuid::new_v4().as_u128();
        let index = usize::try_from(dice % nodes.len() as u128).unwrap_or(0);
        let node = &mut nodes[index];
        if node.has_ended() {
            return Err(Failure::Node {
                name: node.name.clone(),
                reason: "the process ended by itself".into(),
            });
        }
        if (dice >> 64).is_multiple_of(2) {
            tracing::info!(node = node.name, "kill");
            node.kill();
            wait(&mut stop, 1_000).await;
            restart(node, &stop).await?;
        } else {
            tracing::info!(node = node.name, "pause");
            node.pause(true);
            wait(&mut stop, 6_000).await;
            node.pause(false);
        }
    }
    Ok(nodes)
}

/// Starts a killed node. Its servers may be unreachable at that time.
async fn restart(node: &mut Node, stop: &tokio::sync::watch::Receiver<bool>) -> Result<(), Failure> {
    let mut attempts = 0;
    loop {
        node.start()?;
        match node.ready().await {
            Ok(()) => return Ok(()),
            Err(error) if *stop.borrow() && attempts > 20 => return Err(error),
            Err(_) => attempts += 1,
        }
        node.kill();
        sleep(Duration::from_millis(300)).await;
    }
}
