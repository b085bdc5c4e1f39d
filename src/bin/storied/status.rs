//! `storied status`.

use std::collections::BTreeMap;

use serde_json::json;
use uuid::Uuid;

use crate::database::{DatabaseArgs, Models, ReadModelArgs};
use crate::failure::Failure;
use crate::output::Output;
use crate::projection;
use crate::publisher::Publisher;

pub(crate) async fn run(
    read_model: &ReadModelArgs,
    from: &DatabaseArgs,
    out: &mut Output,
) -> Result<(), Failure> {
    let database = from.database()?;
    let Models { store, operator } = read_model.open(from).await?;
    let publisher = Publisher::of(&*store).await?;
    let projections = operator.projections().await?;
    let info = store.info();
    let head = store.high_water_mark().await?;
    let stall = store.stall().await?;
    let mut nodes: BTreeMap<Uuid, Vec<String>> = BTreeMap::new();
    for held in store.leases().await?.into_iter().filter(|held| held.live) {
        nodes.entry(held.lease.owner).or_default().push(held.lease.name);
    }
    if out.json {
        let stall = stall.map(|stall| {
            json!({ "pid": stall.pid, "application_name": stall.application_name, "state": stall.state,
                "open_for_seconds": stall.open_for.as_secs_f64(), "low_water": stall.low_water.get() })
        });
        let nodes: Vec<_> =
            nodes.iter().map(|(node, leases)| json!({ "node": node, "leases": leases })).collect();
        return out.value(&json!({
            "database": database.shown(), "backend": info.backend, "store_id": info.id, "codec": info.codec.name(),
            "adopted": info.adoption.is_adopted(),
            "head": head.get(), "stall": stall, "nodes": nodes, "publisher": publisher.map(|publisher| publisher.value()),
            "projections": projections.iter().map(|record| projection::value(record, head)).collect::<Vec<_>>(),
        }));
    }
    out.line(format!("database   {} ({}, {} payloads)", database.shown(), info.backend, info.codec))?;
    out.line(format!("store      {}", info.id))?;
    if let Some(problem) = info.adoption.problem() {
        out.line(format!("           {problem}"))?;
    }
    out.line(format!("log        up to position {head}"))?;
    if let Some(stall) = stall {
        let pid = stall.pid.map_or("a prepared transaction".to_owned(), |pid| format!("process {pid}"));
        out.line(format!(
            "held back  at {} by {pid} ({}, {}) for {:.1} s",
            stall.low_water,
            stall.application_name,
            stall.state,
            stall.open_for.as_secs_f64()
        ))?;
    }
    if let Some(publisher) = publisher {
        out.line(format!("publisher  {}", publisher.line()))?;
    }
    if nodes.is_empty() {
        out.line("nodes      none holds a lease")?;
    }
    for (node, leases) in nodes {
        out.line(format!("node       {node} holds {}", leases.join(", ")))?;
    }
    if projections.is_empty() {
        return Ok(());
    }
    out.line("")?;
    projection::print(&projections, head, out)
}
