//! storied: an event-sourcing runtime.

pub mod aggregate;
pub mod codec;
pub mod command;
pub mod event;
pub mod runtime;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use ciborium;

pub use self::aggregate::{Aggregate, AggregateOptions, Context, Decision, ExecuteError, Receipt};
pub use self::codec::{Codec, DecodeError, EncodeError, Upcasters};
pub use self::event::{Event, EventName, Metadata, NewEvent, Position, RecordedEvent, StreamId, Version};
pub use self::runtime::Runtime;
pub use self::store::{EventStore, ExpectedVersion, Filter, MemoryStore, ReadLog, StoreError};
#[cfg(feature = "postgres")]
pub use self::store::{PostgresOptions, PostgresStore};
#[cfg(feature = "sqlite")]
pub use self::store::{SqliteOptions, SqliteStore};
