//! storied: an event-sourcing runtime.

pub mod aggregate;
mod backoff;
pub mod bus;
pub mod codec;
pub mod command;
pub mod event;
mod feed;
mod lease;
pub mod projection;
mod publisher;
pub mod runtime;
pub mod store;
mod supervised;
#[cfg(feature = "testing")]
pub mod testing;

pub use ciborium;

pub use self::aggregate::{Aggregate, AggregateOptions, Context, Decision, ExecuteError, Receipt};
pub use self::bus::{EventBus, LocalBus};
pub use self::codec::{Codec, DecodeError, EncodeError, Upcasters};
pub use self::event::{Event, EventName, Metadata, NewEvent, Position, RecordedEvent, StreamId, Version};
pub use self::feed::{FeedOptions, FeedStatus};
#[cfg(feature = "sqlite")]
pub use self::projection::SqliteReadModel;
pub use self::projection::{Projection, ProjectionHandle, ProjectionOptions, ProjectionStatus};
pub use self::publisher::{PublisherOptions, PublisherState, PublisherStatus};
pub use self::runtime::Runtime;
pub use self::store::{EventStore, ExpectedVersion, Filter, MemoryStore, ReadLog, StoreError};
#[cfg(feature = "sqlite")]
pub use self::store::{SqliteOptions, SqliteStore};
pub use self::supervised::StopError;
