//! The other nodes: processes of this program that keep their share of the read models.

use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::Failure;
use crate::args::{Args, Bus};

/// Maximum time of their shutdown.
const PATIENCE: Duration = Duration::from_secs(30);

/// The processes; they end with their standard input, and so with this process.
pub(crate) struct Nodes {
    children: Vec<Child>,
}

impl Nodes {
    /// Starts all but the first one, which is this process.
    pub(crate) fn start(args: &Args) -> Result<Self, Failure> {
        let mut children = Vec::new();
        for _ in 1..args.nodes {
            let program = std::env::current_exe().map_err(Failure::Nodes)?;
            let mut command = Command::new(program);
            command.args(["--node", "--store", "postgres"]);
            if let Some(url) = &args.database_url {
                command.args(["--database-url", url]);
            }
            match args.bus {
                Bus::Local => {}
                Bus::Core => _ = command.args(["--bus", "core"]),
                Bus::JetStream => _ = command.args(["--bus", "jetstream"]),
            }
            if let Some(url) = &args.nats_url {
                command.args(["--nats-url", url]);
            }
            let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true).spawn();
            children.push(child.map_err(Failure::Nodes)?);
        }
        Ok(Self { children })
    }

    /// Ends them. A killed process is no failure, because the others have done its work.
    pub(crate) async fn end(self) -> Result<(), Failure> {
        for mut child in self.children {
            drop(child.stdin.take());
            match timeout(PATIENCE, child.wait()).await {
                Ok(status) => {
                    let status = status.map_err(Failure::Nodes)?;
                    if !status.success() {
                        tracing::warn!(%status, "a node did not end in order");
                    }
                }
                Err(_) => child.kill().await.map_err(Failure::Nodes)?,
            }
        }
        Ok(())
    }
}

/// Waits in another node for the end of the first one.
pub(crate) async fn until_the_first_ends() {
    // Nothing is ever written; an error ends the wait too.
    let _ = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0])).await;
}
