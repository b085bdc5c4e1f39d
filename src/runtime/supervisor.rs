//! The root of the supervision tree.
//!
//! Its children are a router for each aggregate type (which supervises its aggregates), the
//! publisher and the projections (which supervise their own tasks). The supervisor restarts a child
//! that ends by itself. The backoff doubles from 10 ms up to 5 s, and resets after a minute without
//! a failure. The number of restarts has no limit.

use std::sync::{Arc, Weak};
use std::time::Duration;

use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::time::Instant;

use crate::supervised::Respawn;

const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// Run time after which a child counts as healthy.
const HEALTHY: Duration = Duration::from_secs(60);

/// The root actor. Stopping it stops its children.
pub(super) struct Supervisor {
    root: ActorRef<Message>,
    alive: Arc<()>,
}

enum Message {
    /// Restarts a child whenever it ends by itself.
    Adopt(Box<dyn Respawn>),
    /// The backoff of the child with this index is over.
    Restart(usize),
}

struct Root;

struct Child {
    respawn: Box<dyn Respawn>,
    actor: Option<ActorId>,
    started: Instant,
    wait: Duration,
}

impl Child {
    fn start(&mut self, root: &ActorRef<Message>) -> bool {
        self.started = Instant::now();
        match self.respawn.respawn(root.get_cell()) {
            Ok(actor) => {
                self.actor = Some(actor);
                true
            }
            Err(error) => {
                tracing::error!(child = self.respawn.name(), error, "restarting a component failed");
                false
            }
        }
    }
}

impl Actor for Root {
    type Msg = Message;
    type State = Vec<Child>;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Message>, (): ()) -> Result<Vec<Child>, ActorProcessingErr> {
        Ok(Vec::new())
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        children: &mut Vec<Child>,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Adopt(respawn) => {
                let mut child = Child { respawn, actor: None, started: Instant::now(), wait: FIRST_WAIT };
                child.actor = child.respawn.actor();
                children.push(child);
            }
            Message::Restart(number) => {
                if let Some(child) = children.get_mut(number)
                    && !child.start(&myself)
                {
                    restart_later(&myself, number, child);
                }
            }
        }
        Ok(())
    }

    /// Replaces the default of ractor, which ends the root with the first child that ends.
    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Message>,
        event: SupervisionEvent,
        children: &mut Vec<Child>,
    ) -> Result<(), ActorProcessingErr> {
        let (actor, reason) = match event {
            SupervisionEvent::ActorFailed(actor, error) => (actor, error.to_string()),
            SupervisionEvent::ActorTerminated(actor, _, reason) => {
                (actor, reason.unwrap_or_else(|| "no reason given".into()))
            }
            _ => return Ok(()),
        };
        let ended = children.iter_mut().enumerate().find(|(_, child)| child.actor == Some(actor.get_id()));
        if let Some((number, child)) = ended
            && reason != crate::command::SHUTDOWN
        {
            child.actor = None;
            tracing::error!(child = child.respawn.name(), reason, wait = ?child.wait, "restarting a component that ended");
            restart_later(&myself, number, child);
        }
        Ok(())
    }
}

fn restart_later(root: &ActorRef<Message>, number: usize, child: &mut Child) {
    if child.started.elapsed() > HEALTHY {
        child.wait = FIRST_WAIT;
    }
    root.send_after(child.wait, move || Message::Restart(number));
    child.wait = (child.wait * 2).min(LONGEST_WAIT);
}

impl Supervisor {
    pub(super) async fn start() -> Result<Self, String> {
        let (root, _) = Actor::spawn(None, Root, ()).await.map_err(|error| error.to_string())?;
        Ok(Self { root, alive: Arc::new(()) })
    }

    /// Becomes dead as soon as the runtime is dropped; the actors end later.
    pub(super) fn alive(&self) -> Weak<()> {
        Arc::downgrade(&self.alive)
    }

    pub(super) fn cell(&self) -> ActorCell {
        self.root.get_cell()
    }

    /// Restarts a running child whenever it ends by itself.
    pub(super) fn adopt(&self, child: Box<dyn Respawn>) {
        // Fails only if the root has stopped; then the child must not start.
        let _ = self.root.cast(Message::Adopt(child));
    }

    pub(super) fn stop(&self) {
        self.root.stop(Some(crate::command::SHUTDOWN.into()));
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use crate::{
        Aggregate, Context, Decided, Decision, Event, ExecuteError, MemoryStore, NeverRejects,
        NotExecutedKind, Runtime,
    };

    #[derive(Default)]
    struct Light {
        switched: u64,
    }

    #[derive(Serialize, Deserialize)]
    enum LightEvent {
        Switched,
    }

    impl Event for LightEvent {
        const CATEGORY: &'static str = "light";
    }

    impl Aggregate for Light {
        type Event = LightEvent;
        type Command = ();
        type Reply = u64;
        type Error = NeverRejects;

        fn handle(&self, (): &(), _: &Context<'_>) -> Decided<Self> {
            Ok(Decision::event(LightEvent::Switched).reply(self.switched + 1))
        }

        fn apply(&mut self, _: &LightEvent) {
            self.switched += 1;
        }
    }

    #[tokio::test]
    async fn a_router_that_ends_is_restarted() {
        let runtime =
            Runtime::builder().store(MemoryStore::new()).aggregate::<Light>().start().await.unwrap();
        for round in 1..=3 {
            loop {
                match runtime.execute::<Light>("hall", ()).await {
                    Ok(receipt) => break assert_eq!(receipt.reply, round),
                    // Between the end of one router and the start of the next.
                    Err(ExecuteError::NotExecuted { kind: NotExecutedKind::Restarting { .. }, .. }) => {
                        tokio::task::yield_now().await
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            let router = runtime.inner.commands.registry().router::<Light>().unwrap().actor();
            router.kill();
            while router.get_status() != ractor::ActorStatus::Stopped {
                tokio::task::yield_now().await;
            }
        }
        runtime.shutdown().await.unwrap();
    }
}
