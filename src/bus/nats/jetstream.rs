//! The log stream: an exact copy of the log in a JetStream stream, in log order, without gaps.
//!
//! The last message of the stream states how far publishing got. Each message states the sequence
//! number of the message before it. The server refuses a message if that number is not the last
//! one. A paused publisher that resumes after another publisher therefore changes nothing.

mod bus_streams;
mod consumer;
mod field;
mod log_publisher;
mod options;
mod rights;
mod stream;

pub use self::consumer::AckError;
pub(super) use self::consumer::compared_consumer;
pub(super) use self::consumer::{Acker, Consumer, ConsumerItem, ConsumerSpec, Push, Taken};
pub use self::field::Field;
pub(super) use self::log_publisher::LogPublisher;
pub use self::options::{JetStreamOptions, ProvisionPolicy};
pub(super) use self::rights::stream_rights;
pub(super) use self::stream::{ask as stream_api, fields as compared_stream, info as stream_info};
