//! A private PgBouncer, in transaction mode.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Executor};

use super::ports::Port;
use super::postgres::{PostgresServer, unprivileged};
use super::process::{Process, find, on_path, run_as};
use super::workdir::Workdir;

/// A private PgBouncer in front of all databases of a server, which ends with this value.
#[derive(Debug)]
pub struct PgBouncer {
    process: Process,
    port: Port,
}

impl PgBouncer {
    /// Starts a PgBouncer with `connections` to each database, for any number of clients.
    pub async fn start(server: &PostgresServer, connections: u32) -> Self {
        let user = unprivileged();
        let workdir = Workdir::create(user.as_ref());
        let port = Port::claim();
        let users = workdir.path().join("users");
        fs::write(&users, "\"storied\" \"\"\n").expect("a file of users");
        let config = workdir.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={server}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = trust\nauth_file = {users}\npool_mode = transaction\n\
             default_pool_size = {connections}\nmax_client_conn = 500\n",
            server = server.port(),
            port = port.number(),
            users = users.display(),
        );
        fs::write(&config, text).expect("a configuration");
        let mut command = program();
        command.arg(&config);
        let mut bouncer = Self { process: Process::new(workdir), port };
        let url = bouncer.through(&server.url());
        bouncer.process.launch(run_as(&mut command, user.as_ref()), || answers(url.clone())).await;
        bouncer
    }

    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Returns `url` through this PgBouncer.
    pub fn through(&self, url: &str) -> String {
        let database = url.rsplit('/').next().expect("a database");
        format!("postgres://storied@127.0.0.1:{}/{database}", self.port.number())
    }
}

async fn answers(url: String) -> bool {
    let Ok(options) = url.parse::<PgConnectOptions>() else { return false };
    // PgBouncer rejects unknown start-up parameters.
    let Ok(mut connection) = options.extra_float_digits(None).connect().await else { return false };
    connection.execute("select 1").await.is_ok()
}

fn program() -> Command {
    let chosen = env::var_os("STORIED_PGBOUNCER").map(PathBuf::from).into_iter();
    // Debian installs it where only the PATH of root looks.
    let candidates = chosen.chain(["/usr/sbin/pgbouncer".into()]).chain(on_path("pgbouncer"));
    Command::new(find("PgBouncer", candidates))
}
