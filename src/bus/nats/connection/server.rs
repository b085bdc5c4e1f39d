//! The server of a connection: its session, its version, and the text for its absence.

use async_nats::ServerInfo;

use crate::bus::BusError;

/// The oldest supported server. Older servers ignore unknown fields silently.
const OLDEST_SERVER: (u64, u64) = (2, 10);

/// Identity of a session.
pub(super) fn session(info: &ServerInfo) -> (String, u64) {
    (info.server_id.clone(), info.client_id)
}

/// Refuses a server without the required features.
/// Runs after every reconnect, which may reach another server.
pub(super) fn check_version(info: &ServerInfo, to: &str) -> Result<(), BusError> {
    let mut numbers = info.version.split(['.', '-']).map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST_SERVER && info.headers => Ok(()),
        _ => Err(BusError::Incompatible {
            reason: format!(
                "the NATS server at {to} has version {:?}{}; storied needs nats-server 2.10 or \
                 newer",
                info.version,
                if info.headers { "" } else { " and no headers" },
            ),
        }),
    }
}

pub(super) fn disconnected(to: &str, error: Option<String>) -> String {
    match error {
        Some(error) => format!("not connected to NATS at {to} ({error}); retrying"),
        None => format!("not connected to NATS at {to}; retrying"),
    }
}
