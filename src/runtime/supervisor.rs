//! The root of the supervision tree.

use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SupervisionEvent};

/// The root actor; stops its children with it.
pub(super) struct Supervisor {
    root: ActorRef<()>,
}

struct Root;

impl Actor for Root {
    type Msg = ();
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    /// ractor's default would end the root with the first child that ends.
    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<()>,
        event: SupervisionEvent,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(actor, error) = event {
            tracing::error!(actor = %actor.get_id(), %error, "an actor of the runtime failed");
        }
        Ok(())
    }
}

impl Supervisor {
    pub(super) async fn start() -> Result<Self, String> {
        let (root, _) = Actor::spawn(None, Root, ()).await.map_err(|error| error.to_string())?;
        Ok(Self { root })
    }

    pub(super) fn cell(&self) -> ActorCell {
        self.root.get_cell()
    }

    pub(super) fn stop(&self) {
        self.root.stop(Some("shutdown".into()));
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop();
    }
}
