//! The terms of storied, in the order of the data flow.
//!
//! The documentation uses each term in this meaning only.
//!
//! # Writing
//!
//! - **aggregate**: A unit of consistency with a category and an id, such as one order. It decides
//!   on commands and folds its own events into its state. In code: [`Aggregate`](crate::Aggregate).
//! - **command**: A request to an aggregate or a [`Handler`](crate::Handler) to do something, or a
//!   decision over several streams. It is accepted or rejected as a whole. Every command has an id.
//! - **idempotency key**: The value by which a repeated command is recognized: the command id. The
//!   first result answers the repetitions.
//! - **event**: A fact that an aggregate or a decision has recorded in the log. It never changes.
//!   In code: a variant of an enum that implements [`Event`](crate::Event).
//! - **stream**: The events of one aggregate, in order, or the events that decisions write under
//!   one id, or both. Identified by a [`StreamId`](crate::StreamId), which is a category and an id.
//! - **version**: The number of an event in its stream: 1, 2, 3 … without gaps. In code:
//!   [`Version`](crate::Version).
//! - **tag**: A key and a value of an event, such as `course:c1`, by which a query finds it. In
//!   code: [`Event::tags`](crate::Event::tags).
//! - **query**: A condition on names and tags of events, in any streams. In code:
//!   [`Query`](crate::store::Query).
//! - **decision**: The new events and the reply to a command. In code:
//!   [`Decision`](crate::Decision). A *decision over several streams* is a command that is decided
//!   on the events of a query (dynamic consistency boundary, DCB): [`Decide`](crate::Decide).
//! - **recorded step**: A call of a handler to another system, with a result that the store keeps.
//!   A later attempt gets this result without the call. In code:
//!   [`HandlerContext::run`](crate::command::HandlerContext::run).
//! - **view**: The state of a decision over several streams, folded from the events of a query. In
//!   code: [`View`](crate::View). A view of a database, such as `storied.log`, is something else.
//! - **boundary**: A query with the events that a decision has read. The store refuses the append
//!   if another event matches: the event crosses the boundary. In code:
//!   [`Boundary`](crate::store::Boundary).
//! - **in flight**: Accepted and not yet answered, confirmed or acknowledged.
//! - **queue**: Work that is accepted and has not started.
//! - **backpressure**: The reaction of a full queue. The producer waits, or receives an overload
//!   error.
//! - **permit, slot**: The right to run one unit of limited work. A task holds it while it runs,
//!   and returns it at its end.
//!
//! # The log
//!
//! - **log**: All events of a store in one order. In code: [`EventStore`](crate::EventStore).
//! - **position**: The number of an event in the log. Positions increase strictly and may have
//!   gaps. In code: [`Position`](crate::Position).
//! - **batch**: Several items that are written, sent or applied together.
//! - **group commit**: One transaction for the appends of several callers. The callers share the
//!   cost of one commit.
//! - **round trip**: One request to a server and its response.
//! - **high-water mark**: The position up to which the log is complete. No later commit adds an
//!   event at or below it, so a reader that stops there skips no event.
//! - **replay**: Reading events from the log again, to fold them once more.
//!
//! # Distribution
//!
//! - **bus**: The port that carries the log from the publisher to all nodes. In code:
//!   [`EventBus`](crate::EventBus).
//! - **feed**: The live tail of the log inside a process. It reads the store once for all
//!   projections and the publisher. A message of the bus only wakes it. In code:
//!   [`feed`](crate::feed).
//! - **subscription**: A reader of the log or of its copy on the bus, from a position onwards.
//! - **consumer**: JetStream's record of a subscription on its server: the delivered and
//!   acknowledged messages. The term is used for JetStream only.
//! - **ack, nak, term**: The three ways to end a JetStream delivery: done, deliver again, never
//!   deliver again.
//! - **deduplication window**: The time in which JetStream drops a second message with the same id.
//! - **at least once**: Every event is delivered, and possibly more than once. The receiver
//!   deduplicates.
//! - **exactly once**: Every event takes effect once. A projection achieves it by committing its
//!   checkpoint and its read model in one transaction.
//!
//! # Read models
//!
//! - **projection**: Code that folds the events of the log into a read model. In code:
//!   [`Projection`](crate::Projection).
//! - **read model**: Data in the form that queries need. A projection can always build it again
//!   from the log.
//! - **checkpoint**: The position up to which a projection has applied the log. In code:
//!   [`Checkpoint`](crate::store::Checkpoint).
//! - **catch-up**: The phase in which a projection reads old events from the store.
//! - **live**: The phase after the catch-up, in which a projection receives new events from the
//!   feed.
//! - **partition**: A part of the streams, chosen by a hash of the stream id. The partitions of a
//!   projection run in parallel. In code: [`Partition`](crate::Partition).
//! - **snapshot**: A stored copy of a state, with the position or version up to which it is folded.
//! - **rebuild**: Building a new version of a read model from the whole log while the old version
//!   stays in use. In code: [`ProjectionHandle::rebuild`](crate::ProjectionHandle::rebuild).
//! - **cut-over**: The switch of the readers from the old version to the rebuilt one, in one
//!   transaction.
//!
//! # Processes
//!
//! - **process**: Code that reacts to events with commands to other aggregates and with timers. In
//!   code: [`Process`](crate::process::Process). A process of the operating system is a *node
//!   process*, unless the context is clear.
//! - **instance**: A run of a process for one subject, such as one order. It has a stream, which
//!   holds its inputs and effects. In code: [`InstanceHandle`](crate::process::InstanceHandle).
//! - **effect**: A command that an instance sends. It is stored in the append of its reaction, and
//!   has a key that the answer names.
//! - **timer**: A durable wait of an instance, by the clock of the store. When it is due, the
//!   instance receives an input. In code: [`Next::after`](crate::process::Next::after).
//!
//! # Schedules
//!
//! - **scheduled command**: A command that the store keeps until it is due. In code:
//!   [`Execute::after`](crate::command::Execute::after).
//! - **schedule**: A stored rule that creates a command at each of its ticks. In code:
//!   [`Execute::repeat`](crate::command::Execute::repeat), with a
//!   [`Recurrence`](crate::Recurrence). The [`Schedule`](crate::projection::Schedule) of a
//!   projection is something else.
//! - **tick**: A time of a schedule. At a tick, the schedule creates a command, unless the tick is
//!   skipped or missed.
//! - **scheduler**: The part of a node that starts due commands and creates those of ticks, while
//!   the node is the holder of the lease `scheduler`.
//! - **postponed**: Returned to the store by the scheduler, because the target was unavailable or
//!   slow. The command waits again.
//!
//! # Failures
//!
//! - **retry**: Another attempt after a failure that may be temporary.
//! - **backoff**: The wait before a retry. It grows with every failure, up to a maximum.
//! - **jitter**: A random change of a wait. It keeps many callers from retrying at the same time.
//! - **timeout**: The longest duration of an operation.
//! - **deadline**: The point in time at which an operation ends at the latest.
//! - **poison event**: An event that fails again at every attempt.
//! - **parked**: Set aside by a projection after its retries, so that the next events are applied.
//!   Stored as a [`ParkedEvent`](crate::store::ParkedEvent) until it is retried or discarded. A
//!   parked instance of a process records inputs, and reacts to them after a retry. A parked command
//!   of the scheduler was rejected or failed.
//! - **dead letter**: A message that a subscription has given up. It is kept in a stream of its
//!   own.
//!
//! # Ownership
//!
//! - **node**: One running [`Runtime`](crate::Runtime). Its id is new at every start.
//! - **peer**: Another node of the same cluster.
//! - **membership**: The set of nodes that share work, such as the partitions of a projection.
//! - **heartbeat**: A message that a node sends at an interval. Its peers treat a node without
//!   heartbeats as stopped.
//! - **lease**: The exclusive right to a task for a limited time. The lease holder renews it. In
//!   code: [`Lease`](crate::store::Lease).
//! - **lease holder**: The node that has the lease of a task, and the only node that runs the task.
//! - **epoch**: A number that grows with every change of the lease holder. Writes carry it as a
//!   fencing token.
//! - **fenced**: Rejected because of an old epoch. A stale lease holder is fenced: its writes fail
//!   after another node has taken over.
