//! The routes of each process type, created once.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use super::Process;
use super::routes::Routes;

/// Cache of the routes, with one entry per process. Never evicted, because types never change.
static ROUTES: LazyLock<RwLock<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>> = LazyLock::new(RwLock::default);

/// Returns the routes of a process from the cache, or creates them.
pub(super) fn routes_of<P: Process>() -> Arc<Routes<P::Event>> {
    let id = TypeId::of::<P>();
    let cached = ROUTES.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
    if let Some(routes) = cached.and_then(|routes| routes.downcast().ok()) {
        return routes;
    }
    let routes = Arc::new(P::routes());
    ROUTES.write().unwrap_or_else(PoisonError::into_inner).insert(id, routes.clone());
    routes
}
