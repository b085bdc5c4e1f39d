//! Several nodes.

use std::collections::BTreeMap;
use std::time::Duration;

use storied::projection::ProjectionState;
use storied::{Filter, ProjectionHandle};
use tokio::time::Instant;

use super::Scene;
use super::place::Place;
use crate::projection::fixtures::*;

/// So long that only the release of a lease can explain the result.
const LONG: Duration = Duration::from_secs(600);

pub async fn one_of_two_nodes_owns_it<P: Place>(scene: Scene<P>) {
    let options = scene.options().lease(LONG);
    let one = scene.node().await;
    let first = scene.start(&one, scene.writes("owned"), options.clone()).await;
    reach(&first, ProjectionState::Following).await;
    let two = scene.node().await;
    let second = scene.start(&two, scene.writes("owned"), options).await;
    reach(&second, ProjectionState::Standby).await;
    for n in 0..5 {
        let position = scene.append(n, [n, n]).await;
        for handle in [&second, &first] {
            catch_up(handle, position).await;
        }
    }
    assert_eq!((first.status().epoch, second.status().epoch), (1, 0));
    let writers = Writers::start(&scene.store, 2, 30, 5);
    one.stop(PATIENCE).await.unwrap();
    let stopped = Instant::now();
    reach(&second, ProjectionState::Following).await;
    assert!(stopped.elapsed() < Duration::from_secs(10), "{:?}", stopped.elapsed());
    assert_eq!(second.status().epoch, 2);
    writers.done().await;
    catch_up(&second, scene.head().await).await;
    scene.assert_exact("owned", &Filter::all()).await;
    two.stop(PATIENCE).await.unwrap();
}

async fn balanced(handle: &ProjectionHandle, expected: &[usize]) {
    eventually(&format!("{expected:?}"), || {
        let mut owned = BTreeMap::new();
        for owner in handle.status().partitions.iter().filter_map(|partition| partition.owner) {
            *owned.entry(owner).or_insert(0_usize) += 1;
        }
        owned.into_values().collect::<Vec<_>>() == expected
    })
    .await;
}

pub async fn nodes_share_its_partitions<P: Place>(scene: Scene<P>) {
    let options = scene.options().lease(LONG);
    let free = hook(|_| Ok(()));
    let start = async |node| scene.start_made(node, "shared", Some(4), free.clone(), options.clone()).await;
    let one = scene.node().await;
    let first = start(&one).await;
    balanced(&first, &[4]).await;
    let writers = Writers::start(&scene.store, 8, 25, 10);
    let two = scene.node().await;
    let second = start(&two).await;
    balanced(&second, &[2, 2]).await;
    one.stop(PATIENCE).await.unwrap();
    balanced(&second, &[4]).await;
    writers.done().await;
    catch_up(&second, scene.head().await).await;
    scene.assert_partitions_exact("shared", 4).await;
    two.stop(PATIENCE).await.unwrap();
}
