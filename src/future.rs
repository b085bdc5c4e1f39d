//! The return type of the methods of the ports.

use std::future::Future;
use std::pin::Pin;

/// A boxed future that can be sent. Its allocation costs little next to a commit or a message.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
