//! `storied publisher`.

use serde_json::json;
use storied::EventStore;
use uuid::Uuid;

use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::output::Output;

/// Name of the lease of the publisher.
const NAME: &str = "publisher";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Shows the node that publishes to the bus, and its progress
    Status,
}

/// The status of the publisher, as stored.
pub(crate) struct Publisher {
    pub(crate) owner: Option<Uuid>,
    pub(crate) published: u64,
    pub(crate) sequence: u64,
    pub(crate) head: u64,
}

impl Publisher {
    /// Reads the status; `None` if no node has published to a bus.
    pub(crate) async fn of(store: &dyn EventStore) -> Result<Option<Self>, Failure> {
        let lease = store.leases().await?.into_iter().find(|info| info.lease.name == NAME);
        let Some(lease) = lease else { return Ok(None) };
        let checkpoint = store.publisher_checkpoint().await?;
        Ok(Some(Self {
            owner: lease.live.then_some(lease.lease.owner),
            published: checkpoint.position.get(),
            sequence: checkpoint.sequence,
            head: store.high_water_mark().await?.get(),
        }))
    }

    pub(crate) fn value(&self) -> serde_json::Value {
        json!({ "owner": self.owner, "published": self.published, "sequence": self.sequence, "head": self.head,
            "lag": self.head.saturating_sub(self.published) })
    }

    pub(crate) fn line(&self) -> String {
        let whose = match self.owner {
            Some(owner) => format!("node {owner}"),
            None => "no live node".to_owned(),
        };
        let (published, head) = (self.published, self.head);
        format!("{whose}, published up to {published} of {head}, {} behind", head.saturating_sub(published))
    }
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let Command::Status = command;
    let store = from.store().await?;
    let found = Publisher::of(&*store).await?;
    if out.json {
        return out.value(&json!({ "publisher": found.map(|found| found.value()) }));
    }
    match found {
        None => out.line("no node has published to a bus"),
        Some(found) => {
            out.line(format!("publisher  {}", found.line()))?;
            if found.sequence > 0 {
                out.line(format!("log stream up to message {}", found.sequence))?;
            }
            // The publisher writes it at most once a second.
            out.line("           (as last stored, at most once a second)")
        }
    }
}
