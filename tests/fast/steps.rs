//! Recorded steps of handlers: calls to another system.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use storied::command::{HandleError, Handler, HandlerContext, HandlerOptions, StepError};
use storied::{ExecuteError, MemoryStore, Runtime};
use tokio::sync::watch;
use uuid::Uuid;

use crate::support::FaultyStore;

/// A payment provider: the charges that it was asked for, by key.
#[derive(Default)]
struct Provider {
    charges: Mutex<Vec<(Uuid, u64)>>,
    /// Number of the next calls that fail before they have an effect.
    failures: Mutex<u32>,
    /// Calls wait while this is false.
    open: watch::Sender<bool>,
}

impl Provider {
    fn open() -> Arc<Self> {
        Arc::new(Self { open: watch::Sender::new(true), ..Self::default() })
    }

    async fn charge(&self, key: Uuid, cents: u64) -> Result<String, String> {
        self.open.subscribe().wait_for(|open| *open).await.unwrap();
        let mut failures = self.failures.lock().unwrap();
        if *failures > 0 {
            *failures -= 1;
            return Err("the provider is down".into());
        }
        let mut charges = self.charges.lock().unwrap();
        charges.push((key, cents));
        // Another receipt for each call: a repetition is noticed.
        Ok(format!("receipt {}", Uuid::new_v4()))
    }

    fn charges(&self) -> Vec<(Uuid, u64)> {
        self.charges.lock().unwrap().clone()
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Charge {
    /// Charges so many times in steps of one name; then fails so many attempts.
    Times { times: u64, failures: u32 },
    /// A step without an effect.
    Named(String),
    /// A step whose result is read as another type in the second attempt.
    Reread,
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("refused")]
struct Refused;

/// Charges through the provider. Counts its attempts.
struct Payments(Arc<Provider>, Arc<Mutex<u32>>);

impl Handler for Payments {
    const NAME: &'static str = "payments";
    type Command = Charge;
    type Reply = Vec<String>;
    type Error = Refused;

    async fn handle(
        &self,
        charge: &Charge,
        context: &HandlerContext,
    ) -> Result<Vec<String>, HandleError<Refused>> {
        let attempt = {
            let mut attempts = self.1.lock().unwrap();
            *attempts += 1;
            *attempts
        };
        match charge {
            Charge::Times { times, failures } => {
                let mut receipts = Vec::new();
                for cents in 0..*times {
                    receipts.push(context.run("charge", |key| self.0.charge(key, cents)).await?);
                }
                if attempt <= *failures {
                    return Err(HandleError::Failed("the power failed".into()));
                }
                Ok(receipts)
            }
            Charge::Named(name) => {
                let run = context.run(name, async |_| Ok::<_, String>("done".to_owned())).await;
                Ok(vec![match run {
                    Ok(done) => done,
                    Err(StepError::InvalidName(reason)) => format!("invalid: {reason}"),
                    Err(error) => return Err(error.into()),
                }])
            }
            Charge::Reread if attempt == 1 => {
                let _: u64 = context.run("amount", async |_| Ok::<_, String>(5)).await?;
                Err(HandleError::Failed("again".into()))
            }
            Charge::Reread => {
                let read: Result<String, _> =
                    context.run("amount", async |_| Ok::<_, String>("five".into())).await;
                match read {
                    Err(StepError::Decode { name, .. }) => Ok(vec![format!("{name} does not decode")]),
                    other => Ok(vec![format!("{other:?}")]),
                }
            }
        }
    }
}

async fn node(store: FaultyStore, provider: &Arc<Provider>) -> Runtime {
    let options = HandlerOptions::new().workers(8).time_limit(Duration::from_secs(20));
    let payments = Payments(provider.clone(), Arc::default());
    Runtime::builder().store(store).handler_with(payments, options).start().await.unwrap()
}

fn memory() -> FaultyStore {
    FaultyStore::new(MemoryStore::new())
}

/// Sends the command with this id until it has an outcome; returns the reply and the number of failures.
async fn until_done(node: &Runtime, id: Uuid, charge: Charge) -> (Vec<String>, usize) {
    for failures in 0..100 {
        match node.execute_handler::<Payments>(charge.clone()).command_id(id).await {
            Ok(handled) => return (handled.reply, failures),
            Err(ExecuteError::OutcomeUnknown { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    panic!("no outcome");
}

#[tokio::test]
async fn a_step_runs_once_over_all_attempts() {
    let provider = Provider::open();
    let node = node(memory(), &provider).await;
    let (receipts, failures) =
        until_done(&node, Uuid::now_v7(), Charge::Times { times: 1, failures: 2 }).await;
    assert_eq!((failures, receipts.len(), provider.charges().len()), (2, 1, 1));
    node.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_failed_step_runs_again_with_its_key() {
    let provider = Provider::open();
    *provider.failures.lock().unwrap() = 2;
    let node = node(memory(), &provider).await;
    let id = Uuid::now_v7();
    let charge = Charge::Times { times: 1, failures: 0 };
    let error = node.execute_handler::<Payments>(charge.clone()).command_id(id).await.unwrap_err();
    assert!(error.to_string().contains("step \"charge\" failed: the provider is down"), "{error}");
    let (_, failures) = until_done(&node, id, charge).await;
    assert_eq!((failures, provider.charges().len()), (1, 1));
    node.shutdown().await.unwrap();
}

/// Each step of a name has a key and a record of its own, which differ from those of other commands.
#[tokio::test]
async fn steps_of_one_name_are_numbered() {
    let provider = Provider::open();
    let node = node(memory(), &provider).await;
    for commands in 1..3 {
        let (receipts, _) = until_done(&node, Uuid::now_v7(), Charge::Times { times: 3, failures: 1 }).await;
        let distinct: BTreeSet<_> = receipts.iter().collect();
        assert_eq!(distinct.len(), 3);
        let charges: BTreeMap<_, _> = provider.charges().into_iter().collect();
        assert_eq!((charges.len(), provider.charges().len()), (3 * commands, 3 * commands));
    }
    node.shutdown().await.unwrap();
}

/// Two nodes call the provider with one key, and get one result.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_attempts_get_one_result() {
    let (store, id) = (memory(), Uuid::now_v7());
    let provider = Arc::new(Provider::default());
    let nodes = [node(store.clone(), &provider).await, node(store, &provider).await];
    let mut commands = Vec::new();
    for node in &nodes {
        let command = node.execute_handler::<Payments>(Charge::Times { times: 1, failures: 0 });
        commands.push(command.command_id(id).dispatch().await.unwrap());
    }
    while provider.open.receiver_count() < 2 {
        tokio::task::yield_now().await;
    }
    provider.open.send_replace(true);
    let mut receipts = Vec::new();
    for command in commands {
        receipts.push(command.await.unwrap().reply);
    }
    assert_eq!(receipts[0], receipts[1]);
    let charges = provider.charges();
    assert_eq!(charges.len(), 2, "both attempts were at the gate");
    assert_eq!(charges[0], charges[1], "the provider can tell that they are one call");
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}

/// Half of the writes fail or have no answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_the_store_repeats_no_call() {
    let (store, provider) = (memory(), Provider::open());
    let node = node(store.clone(), &provider).await;
    store.fail_sometimes(25);
    for commands in 1..=20 {
        until_done(&node, Uuid::now_v7(), Charge::Times { times: 2, failures: 0 }).await;
        assert_eq!(provider.charges().len(), 2 * commands);
    }
    store.heal();
    node.shutdown().await.unwrap();
}

#[tokio::test]
async fn bad_names_and_changed_types_are_errors() {
    let provider = Provider::open();
    let steps = node(memory(), &provider).await;
    for name in ["", "a\nb", &"x".repeat(401)] {
        let (reply, _) = until_done(&steps, Uuid::now_v7(), Charge::Named(name.to_owned())).await;
        assert!(reply[0].starts_with("invalid: ") && reply[0].contains("name of a step"), "{reply:?}");
    }
    for name in ["charge", "Zahlung über 5 €", &"x".repeat(400)] {
        let (reply, _) = until_done(&steps, Uuid::now_v7(), Charge::Named(name.to_owned())).await;
        assert_eq!(reply, ["done"]);
    }
    steps.shutdown().await.unwrap();
    let steps = node(memory(), &provider).await;
    let (reply, failures) = until_done(&steps, Uuid::now_v7(), Charge::Reread).await;
    assert_eq!((&*reply[0], failures), ("amount does not decode", 1));
    steps.shutdown().await.unwrap();
}

/// A store that is away until the time limit.
#[tokio::test]
async fn a_step_without_a_record_is_an_error() {
    let (store, provider) = (memory(), Provider::open());
    let options = HandlerOptions::new().time_limit(Duration::from_millis(500));
    let payments = Payments(provider.clone(), Arc::default());
    let node = Runtime::builder().store(store.clone()).handler_with(payments, options).start().await.unwrap();
    store.fail_sometimes(100);
    let command = node.execute_handler::<Payments>(Charge::Times { times: 1, failures: 0 });
    let error = command.await.unwrap_err();
    assert!(
        matches!(&error, ExecuteError::OutcomeUnknown { reason, .. } if reason.contains("recording step \"charge\" failed")),
        "{error:?}"
    );
    store.heal();
    node.shutdown().await.unwrap();
}
