//! Delivers stock, places orders, and waits until each is fulfilled.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use storied::process::InstanceState;
use storied::{Aggregate, Runtime};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::Failure;
use crate::args::Args;
use crate::domain::{Fulfilment, Line, Order, OrderCommand, Stock, StockCommand};

/// Maximum time of a command, and of all fulfilments after the last order.
const PATIENCE: Duration = Duration::from_secs(120);

/// Wait before a retry.
const AGAIN: Duration = Duration::from_millis(50);

const PRODUCTS: u128 = 18;

/// Pieces of each product at the start. Later deliveries are too small, so that some lines are sold
/// out.
const STOCK: u64 = 20;

/// Executes a command until it has an outcome.
async fn execute<A: Aggregate>(
    runtime: &Runtime,
    what: &'static str,
    id: &str,
    command: impl Fn() -> A::Command,
) -> Result<(), Failure> {
    let command_id = Uuid::now_v7();
    let give_up = Instant::now() + PATIENCE;
    loop {
        match runtime.execute::<A>(id, command()).command_id(command_id).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_transient() && Instant::now() < give_up => {
                tracing::info!(%command_id, %error, what, "retrying a command");
                sleep(AGAIN).await;
            }
            Err(error) => return Err(Failure::Command { what, reason: error.to_string() }),
        }
    }
}

async fn receive(runtime: &Runtime, product: u128, pieces: u64) -> Result<(), Failure> {
    let product = format!("product-{product}");
    execute::<Stock>(runtime, "a delivery", &product, || StockCommand::Receive { pieces }).await
}

/// Delivers the first stock.
pub(crate) async fn stock(runtime: &Runtime) -> Result<(), Failure> {
    for product in 0..PRODUCTS {
        receive(runtime, product, STOCK).await?;
    }
    Ok(())
}

struct Shared {
    runtime: Runtime,
    payment_timeout: u64,
    left: AtomicU64,
    stop_at: Option<Instant>,
    placed: Mutex<BTreeSet<String>>,
}

/// Places orders. Returns their ids, and the time of the first one.
pub(crate) async fn orders(runtime: &Runtime, args: &Args) -> Result<(BTreeSet<String>, Instant), Failure> {
    let started = Instant::now();
    let shared = Arc::new(Shared {
        runtime: runtime.clone(),
        payment_timeout: args.payment_timeout,
        left: AtomicU64::new(if args.orders == 0 { u64::MAX } else { args.orders }),
        stop_at: (!args.seconds.is_zero()).then(|| started + args.seconds),
        placed: Mutex::default(),
    });
    let callers: Vec<_> = (0..args.callers).map(|_| tokio::spawn(call(shared.clone()))).collect();
    for caller in callers {
        caller.await.map_err(std::io::Error::other)??;
    }
    let placed = std::mem::take(&mut *shared.placed.lock().map_err(|_| Failure::Bug("a caller panicked"))?);
    Ok((placed, started))
}

async fn call(shared: Arc<Shared>) -> Result<(), Failure> {
    let took_one = |left: u64| left.checked_sub(1);
    while shared.stop_at.is_none_or(|stop| Instant::now() < stop)
        && shared.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, took_one).is_ok()
    {
        let dice = Uuid::new_v4().as_u128();
        let order = Uuid::now_v7().to_string();
        let (lines, payment_timeout) = (lines(dice), shared.payment_timeout);
        let place = || OrderCommand::Place { lines: lines.clone(), payment_timeout };
        execute::<Order>(&shared.runtime, "an order", &order, place).await?;
        shared.placed.lock().map_err(|_| Failure::Bug("another caller panicked"))?.insert(order);
        // Fewer pieces than the orders ask for.
        if (dice >> 100).is_multiple_of(8) {
            receive(&shared.runtime, (dice >> 104) % PRODUCTS, 24).await?;
        }
    }
    Ok(())
}

/// Returns up to three lines of different products.
fn lines(dice: u128) -> Vec<Line> {
    (0..=(dice % 3))
        .map(|line| {
            let bits = dice >> (8 + 16 * line);
            // Products of different lines differ in the remainder.
            let product = (bits % (PRODUCTS / 3)) * 3 + line;
            Line {
                product: format!("product-{product}"),
                pieces: 1 + u64::try_from((bits >> 8) % 3).unwrap_or(0),
            }
        })
        .collect()
}

/// Waits until the process of each order has ended, or is parked.
pub(crate) async fn ended(runtime: &Runtime, orders: &BTreeSet<String>) -> Result<(), Failure> {
    let give_up = Instant::now() + PATIENCE;
    for order in orders {
        let instance = runtime.process::<Fulfilment>(order);
        loop {
            match instance.status().await {
                Ok(Some(status))
                    if status.effects.is_empty()
                        && matches!(status.state, InstanceState::Completed | InstanceState::Compensated) =>
                {
                    break;
                }
                Ok(Some(status)) if status.state == InstanceState::Parked => {
                    let reason = status.parked.unwrap_or_default();
                    tracing::error!(order, reason, "the instance is parked");
                    break;
                }
                // The report names it.
                Ok(status) if Instant::now() > give_up => {
                    tracing::error!(order, ?status, "the instance has not ended");
                    return Ok(());
                }
                Err(error) if Instant::now() > give_up => return Err(error.into()),
                Ok(_) | Err(_) => sleep(AGAIN).await,
            }
        }
    }
    Ok(())
}
