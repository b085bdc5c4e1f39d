//! Waiting for a condition.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

/// Upper limit for a step on a busy machine. Only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(60);

const PAUSE: Duration = Duration::from_millis(5);

/// Waits until a condition is true.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < give_up, "never: {what}");
        sleep(PAUSE).await;
    }
}

/// Waits until an asynchronous condition is true.
pub async fn eventually_async(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let fulfilled = async {
        while !condition().await {
            sleep(PAUSE).await;
        }
    };
    timeout(PATIENCE, fulfilled).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Waits until an asynchronous search finds a value, and returns it.
pub async fn eventually_some<T>(what: &str, mut search: impl AsyncFnMut() -> Option<T>) -> T {
    let mut found = None;
    eventually_async(what, async || {
        found = search().await;
        found.is_some()
    })
    .await;
    found.expect("a value")
}
