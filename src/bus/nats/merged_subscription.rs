use std::pin::Pin;
use std::task::{Context, Poll};

use async_nats::{Client, Message, Subscriber};
use futures_util::{FutureExt, Stream, StreamExt};
use tokio::task::unconstrained;

use super::errors::unavailable;
use super::wire::position_of;
use crate::bus::BusError;

/// Several subscriptions of one connection, merged in log order.
///
/// The connection fills the buffers of its subscriptions in the order in which the server sent the
/// messages. If one buffer has a message, the other buffers have every message sent before it.
/// Therefore the next message is the first message with the smallest position.
pub(super) struct Merged {
    parts: Vec<Part>,
}

struct Part {
    subscriber: Subscriber,
    /// First message of the buffer, taken out for the comparison.
    first: Option<(u64, Message)>,
    ended: bool,
}

impl Merged {
    /// Subscribes to all of `subjects`.
    /// With a queue group, the server gives each message to one member.
    pub(super) async fn subscribe(
        client: &Client,
        subjects: &[String],
        group: Option<&str>,
    ) -> Result<Self, BusError> {
        let mut parts = Vec::with_capacity(subjects.len());
        for subject in subjects {
            let subscriber = subscribe(client, subject, group).await?;
            parts.push(Part { subscriber, first: None, ended: false });
        }
        Ok(Self { parts })
    }

    /// Takes the first message of each buffer without one. `all` ignores the coop budget of tokio.
    fn poll_firsts(&mut self, cx: &mut Context<'_>, all: bool) -> bool {
        for part in self.parts.iter_mut().filter(|part| part.first.is_none() && !part.ended) {
            let mut next = part.subscriber.next();
            let polled = if all { unconstrained(next).poll_unpin(cx) } else { next.poll_unpin(cx) };
            match polled {
                // A message without a position is not of storied and needs no order.
                Poll::Ready(Some(message)) => {
                    part.first = Some((position_of(&message).unwrap_or(0), message))
                }
                Poll::Ready(None) => part.ended = true,
                Poll::Pending => {}
            }
        }
        self.parts.iter().any(|part| part.first.is_some())
    }
}

impl Stream for Merged {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Message>> {
        if let [part] = &mut *self.parts {
            return part.subscriber.poll_next_unpin(cx);
        }
        if !self.poll_firsts(cx, false) {
            return if self.parts.iter().all(|part| part.ended) { Poll::Ready(None) } else { Poll::Pending };
        }
        // Poll again: an earlier message may have arrived after the first poll of its buffer.
        self.poll_firsts(cx, true);
        let firsts = self.parts.iter_mut().map(|part| &mut part.first).filter(|first| first.is_some());
        let next = firsts.min_by_key(|first| first.as_ref().map(|(position, _)| *position));
        Poll::Ready(next.and_then(Option::take).map(|(_, message)| message))
    }
}

/// Subscribes to one subject.
pub(super) async fn subscribe(
    client: &Client,
    subject: &str,
    group: Option<&str>,
) -> Result<Subscriber, BusError> {
    let subscribed = match group {
        Some(group) => client.queue_subscribe(subject.to_owned(), group.to_owned()).await,
        None => client.subscribe(subject.to_owned()).await,
    };
    subscribed.map_err(|error| unavailable(format!("subscribing to {subject}"), error))
}
