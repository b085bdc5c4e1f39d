//! Snapshots of the state: encoded when they are due, written when they are durable.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::super::Aggregate;
use super::super::fold::HydratedState;
use super::super::options::AggregateOptions;
use super::shared::Shared;
use crate::event::{StreamId, Version};
use crate::panic::panic_text;

/// Encodes the state if a snapshot is due.
///
/// The state may be speculative. The encoded form waits until its version is durable.
pub(super) fn stage_snapshot<A: Aggregate>(
    options: &AggregateOptions<A>,
    staged: &mut Option<(Version, Vec<u8>)>,
    folded: &mut HydratedState<A>,
) {
    let Some(snapshots) = &options.snapshots else { return };
    if staged.is_some() || folded.version.get() < folded.snapshot.get() + snapshots.every {
        return;
    }
    let encoded = catch_unwind(AssertUnwindSafe(|| (snapshots.encode)(&folded.state)))
        .unwrap_or_else(|panic| Err(panic_text(&*panic)));
    match encoded {
        Ok(bytes) => *staged = Some((folded.version, bytes)),
        Err(error) => {
            tracing::warn!(%error, "could not encode the state of an aggregate; skipping the snapshot");
            // Do not retry with every event.
            folded.snapshot = folded.version;
        }
    }
}

/// Writes the staged snapshot in a separate task.
pub(super) fn take_snapshot<A: Aggregate>(
    shared: &Shared<A>,
    stream: &StreamId,
    folded: &mut HydratedState<A>,
    staged: &mut Option<(Version, Vec<u8>)>,
) {
    let (Some((version, bytes)), Some(snapshots)) = (staged.take(), &shared.options.snapshots) else {
        return;
    };
    // Also advance after a skipped snapshot. Otherwise every event would encode the state until
    // a permit is free.
    folded.snapshot = version;
    let Ok(permit) = shared.snapshots.clone().try_acquire_owned() else {
        return tracing::debug!(%stream, %version, "skipping a snapshot; other snapshots are being written");
    };
    let (store, stream) = (shared.store.clone(), stream.clone());
    match folded.pack(version, snapshots.revision, bytes) {
        Ok(snapshot) => {
            tokio::spawn(async move {
                let _permit = permit;
                if let Err(error) = store.save_snapshot(&stream, snapshot).await {
                    tracing::warn!(%stream, %version, %error, "could not save a snapshot; retrying with the next one");
                }
            });
        }
        Err(error) => tracing::warn!(%stream, %version, %error, "could not encode a snapshot"),
    }
}
