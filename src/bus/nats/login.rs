//! The login of a connection, and the files of its credentials and certificates.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use async_nats::{ConnectOptions, ServerAddr};
use tokio::task::spawn_blocking;

use super::wire::percent_decoded;
use crate::bus::BusError;
use crate::input_file;

/// The option of the credentials file, in errors.
const CREDENTIALS: &str = "NatsOptions::credentials_file";

/// The credentials.
#[derive(Clone)]
pub(super) enum Login {
    None,
    User { name: String, password: String },
    Token(String),
    NKey(String),
    Credentials(PathBuf),
}

impl Login {
    /// Adds the login to the options for async-nats.
    pub(super) async fn add_to(
        &self,
        options: ConnectOptions,
        servers: &[ServerAddr],
    ) -> Result<ConnectOptions, BusError> {
        Ok(match self {
            Self::None => url_login(options, servers),
            Self::User { name, password } => options.user_and_password(name.clone(), password.clone()),
            Self::Token(token) => options.token(token.clone()),
            Self::NKey(seed) => options.nkey(seed.clone()),
            Self::Credentials(path) => {
                // The error of the parser is left out: it may quote the file.
                options.credentials(&credentials(path).await?).map_err(|_| BusError::Incompatible {
                    reason: format!(
                        "{CREDENTIALS}: {} contains no JWT and seed; name a credentials file of NATS",
                        path.display()
                    ),
                })?
            }
        })
    }
}

/// Refuses a file that async-nats would read without an end, or that it could not read.
pub(super) fn check_file(option: &str, path: &Path) -> Result<(), BusError> {
    let refused = |problem| Err(BusError::Incompatible { reason: format!("{option}: {problem}") });
    input_file::problem(path).map_or(Ok(()), refused)
}

/// Reads a credentials file.
async fn credentials(path: &Path) -> Result<String, BusError> {
    check_file(CREDENTIALS, path)?;
    let file = path.to_owned();
    let read = spawn_blocking(move || {
        let mut text = String::new();
        // Limited, because the file may have grown since the check.
        File::open(file)?.take(input_file::MOST).read_to_string(&mut text)?;
        Ok(text)
    });
    let read = read.await.map_err(std::io::Error::other).flatten();
    read.map_err(|error: std::io::Error| BusError::Incompatible {
        reason: format!(
            "{CREDENTIALS}: reading {} failed: {error}; correct the path or its permissions",
            path.display()
        ),
    })
}

/// Whether every login in a list of servers is at its proper position.
///
/// A comma, slash or similar in a password makes its first part look like a host. The bus would
/// connect to it, and errors would reveal it.
pub(super) fn logins_are_plain(servers: &str) -> bool {
    servers.split(',').enumerate().all(|(index, server)| {
        let scheme = server.split_once("://");
        let rest = scheme.map_or(server, |(_, rest)| rest);
        let behind_host = rest.find(['/', '?', '#', '\\']).map_or("", |end| &rest[end..]);
        let begins_anew = index == 0 || scheme.is_some() || !server.contains('@');
        begins_anew && !behind_host.contains('@')
    })
}

/// Logs in with the login of a URL (`user:password@` or `token@`), which async-nats ignores.
fn url_login(options: ConnectOptions, servers: &[ServerAddr]) -> ConnectOptions {
    let Some((name, password)) =
        servers.iter().find_map(|server| Some((server.username()?, server.password())))
    else {
        return options;
    };
    let plain = |text: &str| percent_decoded(text).unwrap_or_else(|| text.to_owned());
    match password {
        Some(password) => options.user_and_password(plain(name), plain(password)),
        None => options.token(plain(name)),
    }
}
