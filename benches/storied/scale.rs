//! Several node processes on one PostgreSQL.

use std::process::Stdio;
use std::time::Instant;

use storied::{PostgresStore, Runtime};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

use crate::args::Plan;
use crate::domain::{Account, AccountCommand, text};
use crate::measure::{Comparison, Run, closed_loop};
use crate::support::PostgresServer;

/// First argument of a node process.
pub const NODE: &str = "scale-node";

const AGGREGATES: usize = 250;

/// Runs `nodes` processes, each with its own aggregates and `callers` callers.
///
/// Every commit of the server takes 2 ms longer, as on a slow disk or with a synchronous replica.
/// The limit is one such process.
pub async fn scale(plan: &Plan, nodes: usize) -> Comparison {
    let server = PostgresServer::start_with(&["commit_delay=2000", "commit_siblings=0"]).await;
    let limit = processes(plan, &server, 1).await;
    let ours = processes(plan, &server, nodes).await;
    Comparison { ours, limit, note: format!("{nodes} processes; the limit is one of them") }
}

async fn processes(plan: &Plan, server: &PostgresServer, count: usize) -> Run {
    let url = server.create_database().await;
    PostgresStore::connect(&url).await.unwrap();
    let mut nodes = Vec::new();
    for node in 0..count {
        nodes.push(Node::start(&url, plan, node).await);
    }
    let start = Instant::now();
    for node in &mut nodes {
        node.go().await;
    }
    for node in &mut nodes {
        node.line("done").await;
    }
    let elapsed = start.elapsed();
    for mut node in nodes {
        assert!(node.process.wait().await.unwrap().success());
    }
    Run::whole(count * plan.events, elapsed)
}

struct Node {
    process: Child,
    output: BufReader<ChildStdout>,
}

impl Node {
    /// Starts a process and returns when it is ready.
    async fn start(url: &str, plan: &Plan, node: usize) -> Self {
        let numbers = [node, plan.callers, plan.events, plan.payload].map(|number| number.to_string());
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([NODE, url])
            .args(numbers)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut node = Self { process, output };
        node.line("ready").await;
        node
    }

    async fn line(&mut self, expected: &str) {
        let mut line = String::new();
        self.output.read_line(&mut line).await.unwrap();
        assert_eq!(line.trim(), expected);
    }

    async fn go(&mut self) {
        self.process.stdin.as_mut().unwrap().write_all(b"go\n").await.unwrap();
    }
}

/// Runs a node process.
pub async fn node(args: &[String]) {
    let [url, numbers @ ..] = args else { panic!("a node needs a database") };
    let numbers: Vec<usize> = numbers.iter().map(|number| number.parse().unwrap()).collect();
    let [node, callers, events, payload] = numbers[..] else { panic!("a node needs four numbers") };
    let store = PostgresStore::connect(url).await.unwrap();
    let runtime = Runtime::builder().store(store).aggregate::<Account>().start().await.unwrap();
    let execute = |n: usize, command: AccountCommand| {
        let runtime = runtime.clone();
        async move {
            drop(runtime.execute::<Account>(format!("{node}-{}", n % AGGREGATES), command).await.unwrap())
        }
    };
    closed_loop(callers, AGGREGATES, |n| execute(n, AccountCommand::Look)).await;
    println!("ready");
    let mut line = String::new();
    // The process has no other work during the wait.
    std::io::stdin().read_line(&mut line).unwrap();
    let text = text(payload);
    closed_loop(callers, events, |n| execute(n, AccountCommand::Enter(text.clone()))).await;
    println!("done");
    runtime.shutdown().await.unwrap();
}
