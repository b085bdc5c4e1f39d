//! What the ports' methods return.

use std::future::Future;
use std::pin::Pin;

/// A future that can be boxed, sent and held in a trait object: beside a commit or a message, what that costs is nothing.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
