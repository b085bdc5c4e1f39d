//! Aggregates that only this node's own components command, without the command bus.

use ractor::{ActorCell, SpawnErr};
use tokio::time::Instant;

use super::hooks::CommandHooks;
use super::router::Router;
use super::target::{Answer, Routed, RoutedCommand, ToAggregate};
use crate::aggregate::{self, Aggregate};
use crate::command_id;
use crate::event::Metadata;
use crate::store::ExpectedVersion;
use crate::telemetry::trace::CommandSpan;

/// The aggregates of one type, on this node only.
///
/// Other nodes may have actors of the same aggregates. Then expected versions decide between them.
pub(crate) struct LocalAggregates<A: Aggregate> {
    router: Router<ToAggregate<A>>,
    hooks: CommandHooks,
}

impl<A: Aggregate> LocalAggregates<A> {
    /// Starts the actor under `supervisor`.
    pub(crate) fn start(shared: aggregate::Shared<A>, supervisor: ActorCell) -> Result<Self, SpawnErr> {
        Ok(Self { router: Router::start(shared, supervisor)?, hooks: CommandHooks::default() })
    }

    /// Executes a command with a new id. Its content is not recorded: no caller repeats the id.
    pub(crate) async fn execute(
        &self,
        id: &str,
        command: A::Command,
        mut metadata: Metadata,
        expected: ExpectedVersion,
        deadline: Instant,
    ) -> Answer<ToAggregate<A>> {
        let address = ToAggregate::<A>::address(Some(id))?;
        let command_id = command_id::new();
        let started = Instant::now();
        let permit = self.router.admit(command_id, deadline).await?;
        let name = ToAggregate::<A>::NAME;
        let command = RoutedCommand {
            command,
            id: command_id,
            fingerprint: 0,
            span: CommandSpan::given(name, Some(id), command_id, &mut metadata),
            metadata,
            key: Some(id.to_owned()),
            address,
            expected,
            deadline,
        };
        self.router.submit(&self.hooks, command, permit, started)?.await
    }

    /// Stops admission, waits for the commands in flight, and stops the actor.
    ///
    /// Returns the number of commands without an answer at the deadline.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        self.router.shut_down(deadline).await
    }
}
