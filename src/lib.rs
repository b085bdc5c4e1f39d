//! storied: an event-sourcing runtime.

pub mod codec;
pub mod event;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use ciborium;

pub use self::codec::{Codec, DecodeError, EncodeError, Upcasters};
pub use self::event::{Event, EventName, Metadata, NewEvent, Position, RecordedEvent, StreamId, Version};
pub use self::store::{EventStore, Filter, MemoryStore, StoreError};
#[cfg(feature = "sqlite")]
pub use self::store::{SqliteOptions, SqliteStore};
