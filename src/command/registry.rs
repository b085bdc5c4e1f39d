//! The aggregates and handlers of this process. They are fixed after the start of the runtime.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;

use ractor::{ActorCell, SpawnErr};
use tokio::time::Instant;

use super::endpoint::Endpoint;
use super::handler::HandlerStatus;
use super::router::Router;
use super::target::{Routed, TargetStatus};
use super::wire::Kind;
use crate::aggregate::RouterStatus;

/// The aggregates and handlers of a node.
#[derive(Default)]
pub(crate) struct Registry {
    endpoints: HashMap<(Kind, &'static str), Box<dyn Endpoint>>,
}

impl Registry {
    /// Adds an aggregate or handler, and starts its actor under `supervisor`.
    pub(crate) fn start<T: Routed>(
        &mut self,
        shared: T::Shared,
        supervisor: ActorCell,
    ) -> Result<(), SpawnErr> {
        let router = Router::<T>::start(shared, supervisor)?;
        self.endpoints.insert((T::KIND, T::NAME), Box::new(router));
        Ok(())
    }

    /// Returns the router of an aggregate or handler of this node.
    pub(crate) fn router<T: Routed>(&self) -> Option<&Router<T>> {
        let endpoint: &dyn Any = &**self.endpoints.get(&(T::KIND, T::NAME))?;
        endpoint.downcast_ref()
    }

    pub(super) fn endpoint(&self, kind: Kind, name: &str) -> Option<&dyn Endpoint> {
        // Names from other nodes are not `'static`, so they are compared as text.
        let found = self.endpoints.iter().find(|((of, called), _)| *of == kind && *called == name);
        found.map(|(_, endpoint)| &**endpoint)
    }

    /// Returns the names of one kind that this node handles.
    pub(super) fn names(&self, kind: Kind) -> impl Iterator<Item = &'static str> {
        self.endpoints.keys().filter(move |(of, _)| *of == kind).map(|(_, name)| *name)
    }

    /// Returns the status of the aggregates by category, and of the handlers by name.
    pub(crate) fn status(&self) -> (Vec<RouterStatus>, Vec<HandlerStatus>) {
        let (mut aggregates, mut handlers) = (Vec::new(), Vec::new());
        for endpoint in self.endpoints.values() {
            match endpoint.status() {
                TargetStatus::Aggregate(status) => aggregates.push(status),
                TargetStatus::Handler(status) => handlers.push(status),
            }
        }
        aggregates.sort_by(|a, b| a.category.cmp(&b.category));
        handlers.sort_by_key(|handler| handler.name);
        (aggregates, handlers)
    }

    /// Stops admission of all endpoints, and waits for the commands in flight.
    ///
    /// Returns the number of commands without an answer at the deadline.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        // Stop handlers first: their running attempts need the aggregates.
        let mut unanswered = 0;
        for kind in [Kind::Handler, Kind::Aggregate] {
            let all = self.endpoints.iter().filter(|((of, _), _)| *of == kind);
            let all = all.map(|(_, endpoint)| endpoint.shut_down(deadline));
            unanswered += futures_util::future::join_all(all).await.into_iter().sum::<usize>();
        }
        unanswered
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.endpoints.keys()).finish()
    }
}
