//! Waits for the input of a task, or for an earlier message, loss of the lease or timeout.

use std::future::Future;

use tokio::time::{Instant, sleep_until};

use super::news::News;
use crate::lease::HeldLease;
use crate::projection::control::Control;
use crate::supervised::Inbox;

/// Result of a wait.
pub(super) enum WaitOutcome<T> {
    /// The time is over, or an event occurred that the next round handles.
    Round,
    Control(Control),
    LeaseLost,
    News,
    Input(T),
}

/// Waits for `input`, or for an earlier message, loss or timeout. Cancel-safe if `input` is.
pub(super) async fn wait_for_input<T>(
    inbox: &mut Inbox<Control>,
    lease: Option<&mut HeldLease>,
    news: Option<&mut News>,
    until: Option<Instant>,
    input: impl Future<Output = T>,
) -> WaitOutcome<T> {
    tokio::select! {
        biased;
        control = inbox.next() => control.map_or(WaitOutcome::Round, WaitOutcome::Control),
        () = async {
            match lease {
                Some(lease) => lease.lost().await,
                None => std::future::pending().await,
            }
        } => WaitOutcome::LeaseLost,
        () = async {
            match news {
                Some(news) => news.changed().await,
                None => std::future::pending().await,
            }
        } => WaitOutcome::News,
        () = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        } => WaitOutcome::Round,
        input = input => WaitOutcome::Input(input),
    }
}
