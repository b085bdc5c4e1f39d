//! The ways to subscribe. Each must pass the same suite.

use storied::bus::{ConsumerOptions, NatsBus, SubscribeOptions};

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Core,
    Ephemeral,
    Durable,
    Push,
    Queue,
    CoreQueue,
    DurableQueue,
    PushQueue,
}

pub const WAYS: [Way; 8] = [
    Way::Core,
    Way::Ephemeral,
    Way::Durable,
    Way::Push,
    Way::Queue,
    Way::CoreQueue,
    Way::DurableQueue,
    Way::PushQueue,
];

impl Way {
    pub fn kind(self) -> Kind {
        if matches!(self, Way::Core | Way::CoreQueue) { Kind::Core } else { Kind::JetStream }
    }

    /// Options of the subscriber with that name. With a queue, all subscribers of a name share.
    pub fn options(self, name: &str) -> SubscribeOptions {
        self.options_with(name, |consumer| consumer)
    }

    /// The same with changed consumer options.
    pub fn options_with(
        self,
        name: &str,
        change: impl FnOnce(ConsumerOptions) -> ConsumerOptions,
    ) -> SubscribeOptions {
        let options = SubscribeOptions::new();
        let durable = ConsumerOptions::durable(name);
        match self {
            Way::Core => options,
            Way::CoreQueue => options.load_balancer(name),
            Way::Queue => options.load_balancer(name).consumer(change(ConsumerOptions::ephemeral())),
            Way::Ephemeral => options.consumer(change(ConsumerOptions::ephemeral())),
            Way::Durable => options.consumer(change(durable)),
            Way::Push => options.consumer(change(durable.push())),
            Way::DurableQueue => options.load_balancer(name).consumer(change(durable)),
            Way::PushQueue => options.load_balancer(name).consumer(change(durable.push())),
        }
    }

    pub async fn start(self) -> (NatsBus, NatsServer) {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        (options(self.kind(), &server).bus(), server)
    }
}
