//! The reported lag.

use std::time::Duration;

use storied::projection::{ProjectionState, ProjectionStatus, TargetUnavailable};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Scene;
use super::place::Place;
use crate::projection::fixtures::*;

/// Tolerance for the clocks of the store and of this node, which round differently on one machine.
const ROUNDING: Duration = Duration::from_millis(2);

/// Eventually the age is that of an event that was appended between these two moments.
async fn ages(what: &str, status: impl Fn() -> ProjectionStatus, from: Instant, to: Instant) {
    // Long enough to distinguish it from the time since a node noticed.
    let long = to.elapsed() + Duration::from_millis(100);
    eventually(what, || {
        let least = to.elapsed();
        let status = status();
        let Some(age) = status.lag_time() else { return false };
        status.lag() > Some(0) && age + ROUNDING >= least && age <= from.elapsed() + ROUNDING && age > long
    })
    .await;
}

/// Fails with a transient error for every event after a position, without holding a database.
fn up_to(limit: &watch::Sender<u64>) -> Hook {
    let limit = limit.subscribe();
    hook(move |event| {
        let wait = event.position.get() > *limit.borrow();
        if wait { Err(TargetUnavailable::new("not yet").into()) } else { Ok(()) }
    })
}

pub async fn reports_its_lag<P: Place>(scene: Scene<P>) {
    let limit = watch::Sender::new(0);
    let writes = || scene.writes("behind").hook(up_to(&limit));
    let live = |handle: &storied::ProjectionHandle| {
        let status = handle.status();
        status.lag() == Some(0) && status.lag_time() == Some(Duration::ZERO) && status.behind_since.is_none()
    };
    // Events from before the projection.
    let from = Instant::now();
    let first = scene.append(0, [1]).await;
    let to = Instant::now();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let second_from = Instant::now();
    scene.append(0, 2..=20).await;
    let second_to = Instant::now();

    let node = scene.node().await;
    // Each event commits by itself, so a later failure does not undo it.
    let handle = scene.start(&node, writes(), scene.options().batch_size(1)).await;
    ages("catching up", || handle.status(), from, to).await;
    limit.send_replace(first.get());
    catch_up(&handle, first).await;
    ages("between", || handle.status(), second_from, second_to).await;
    limit.send_replace(u64::MAX);
    catch_up(&handle, scene.head().await).await;
    eventually("it is live", || live(&handle)).await;

    // Live.
    let position = scene.append(0, [3]).await;
    catch_up(&handle, position).await;
    eventually("it is live again", || live(&handle)).await;
    limit.send_replace(position.get());
    let from = Instant::now();
    scene.append(0, [4]).await;
    let to = Instant::now();
    tokio::time::sleep(Duration::from_millis(100)).await;
    scene.append(0, [5]).await;
    ages("following", || handle.status(), from, to).await;

    // The next event stays unread: the projection is paused, on this node, on the next one, and on
    // an idle one.
    handle.pause().await.unwrap();
    ages("paused", || handle.status(), from, to).await;
    let other = scene.node().await;
    let looker = scene.start(&other, writes(), scene.options()).await;
    ages("looking on", || looker.status(), from, to).await;
    node.stop(PATIENCE).await.unwrap();
    reach(&looker, ProjectionState::Paused).await;
    ages("paused elsewhere", || looker.status(), from, to).await;
    limit.send_replace(u64::MAX);
    looker.resume().await.unwrap();
    catch_up(&looker, scene.head().await).await;
    eventually("it is live at last", || live(&looker)).await;
    other.stop(PATIENCE).await.unwrap();
}
