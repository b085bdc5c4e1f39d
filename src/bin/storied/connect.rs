//! Connecting to NATS from the command line.

use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use storied::NatsBus;
use storied::bus::{EventBus, JetStreamOptions, NatsOptions, ProvisionPolicy, Subjects};

use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::input_file;
use crate::redact::Given;
use crate::wait::{Server, with_notice};

/// The NATS server, and the options of the publishing program.
#[derive(Debug, clap::Args)]
pub(crate) struct NatsArgs {
    /// NATS server, or several separated by commas
    #[arg(
        long,
        env = "NATS_URL",
        hide_env_values = true,
        default_value = "nats://127.0.0.1:4222",
        value_name = "URL"
    )]
    nats_url: String,

    /// Credentials file
    #[arg(long, env = "NATS_CREDS", value_name = "FILE")]
    nats_creds: Option<PathBuf>,

    /// User name, with --nats-password
    #[arg(long, env = "NATS_USER", value_name = "NAME", requires = "nats_password")]
    nats_user: Option<String>,

    /// Password of that user
    #[arg(long, env = "NATS_PASSWORD", hide_env_values = true, value_name = "PASSWORD")]
    nats_password: Option<String>,

    /// Token
    #[arg(long, env = "NATS_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    nats_token: Option<String>,

    /// Seed of an NKey
    #[arg(long, env = "NATS_NKEY", hide_env_values = true, value_name = "SEED")]
    nats_nkey: Option<String>,

    /// Trusts the certificates in this PEM file instead of the system's, and requires TLS
    #[arg(long, env = "NATS_CA", value_name = "FILE")]
    nats_ca: Option<PathBuf>,

    /// Client certificate; requires TLS
    #[arg(long, env = "NATS_CERT", value_name = "FILE", requires = "nats_key")]
    nats_cert: Option<PathBuf>,

    /// Key of that certificate
    #[arg(long, env = "NATS_KEY", value_name = "FILE")]
    nats_key: Option<PathBuf>,

    /// First tokens of the reply subjects (NatsOptions::inbox_prefix)
    #[arg(long, env = "NATS_INBOX_PREFIX", default_value = "_INBOX", value_name = "PREFIX")]
    nats_inbox_prefix: String,

    /// First tokens of all subjects
    #[arg(long, env = "STORIED_NAMESPACE", default_value = "storied", value_name = "NAME")]
    namespace: String,

    /// Prefix of event subjects, if the program sets one (Subjects::prefix)
    #[arg(long, value_name = "PREFIX")]
    subject_prefix: Option<String>,

    /// Number of partitions in event subjects, 1 to 65535, if the program sets one (Subjects::partitions)
    #[arg(long, value_name = "PARTITIONS")]
    subject_partitions: Option<NonZeroU16>,

    /// Stream of the log stream, if the program names it (JetStreamOptions::stream)
    #[arg(long, value_name = "NAME")]
    stream: Option<String>,
}

/// Maximum age of messages, in seconds: that of JetStreamOptions.
const CENTURY: u64 = 36_500 * 86_400;

/// Expected properties of a stream, if the program sets other than the defaults.
#[derive(Debug, clap::Args)]
pub(crate) struct StreamArgs {
    /// Number of servers that keep the streams, 1 to 5
    #[arg(long, default_value_t = 1, value_name = "SERVERS", value_parser = clap::value_parser!(u8).range(1..=5))]
    replicas: u8,

    /// Keeps streams in memory
    #[arg(long)]
    memory_storage: bool,

    /// Maximum age of a message in the log stream, in seconds, up to 3153600000; 0 is unlimited
    #[arg(long, default_value_t = 604_800, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=CENTURY))]
    max_age: u64,

    /// Maximum size of the log stream, in bytes, up to 2^63-1; 0 is unlimited
    #[arg(long, default_value_t = 1 << 30, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(0..=i64::MAX as u64))]
    max_bytes: u64,

    /// Deduplication window of the server, in seconds, 1 to 3153600000
    #[arg(long, default_value_t = 120, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=CENTURY))]
    duplicate_window: u64,

    /// Checks only the requirements of an exact log stream (ProvisionPolicy::RequireExisting)
    #[arg(long)]
    essential: bool,
}

impl StreamArgs {
    fn options(&self) -> JetStreamOptions {
        let policy =
            if self.essential { ProvisionPolicy::RequireExisting } else { ProvisionPolicy::CreateOrVerify };
        JetStreamOptions::new()
            .replicas(usize::from(self.replicas))
            .memory_storage(self.memory_storage)
            .max_age(Some(Duration::from_secs(self.max_age)).filter(|age| !age.is_zero()))
            .max_bytes(Some(self.max_bytes).filter(|bytes| *bytes > 0))
            .duplicate_window(Duration::from_secs(self.duplicate_window))
            .policy(policy)
    }
}

impl NatsArgs {
    /// Returns the secrets that must not be printed.
    pub(crate) fn secrets(&self) -> Vec<Given<'_>> {
        let secrets = [&self.nats_password, &self.nats_token, &self.nats_nkey];
        let secrets = secrets.into_iter().flatten().map(|secret| Given::Secret(secret));
        secrets.chain([Given::Urls(&self.nats_url)]).collect()
    }

    /// Checks the files that the options name. Call it before the first connection of a command.
    pub(crate) fn check_files(&self) -> Result<(), Failure> {
        let files = [
            ("--nats-creds", &self.nats_creds),
            ("--nats-ca", &self.nats_ca),
            ("--nats-cert", &self.nats_cert),
            ("--nats-key", &self.nats_key),
        ];
        for (option, path) in files {
            if let Some(problem) = path.as_deref().and_then(input_file::problem) {
                return Err(Failure::Usage(format!("{option}: {problem}")));
            }
        }
        Ok(())
    }

    /// Connects to the bus.
    pub(crate) async fn bus(
        &self,
        stream: Option<&StreamArgs>,
        from: &DatabaseArgs,
    ) -> Result<NatsBus, Failure> {
        let usage = |error: &dyn std::fmt::Display| Failure::Usage(error.to_string());
        let mut jetstream = stream.map_or_else(JetStreamOptions::new, StreamArgs::options);
        if let Some(stream) = &self.stream {
            jetstream = jetstream.stream(stream);
        }
        let mut subjects = match &self.subject_prefix {
            Some(prefix) => Subjects::prefix(prefix).map_err(|error| usage(&error))?,
            None => Subjects::new(),
        };
        if let Some(partitions) = self.subject_partitions {
            subjects = subjects.partitions(partitions);
        }
        let mut options = NatsOptions::jetstream(jetstream)
            .url(&self.nats_url)
            .name("storied-cli")
            .subjects(subjects)
            .connection_timeout(from.timeout())
            .answer_timeout(from.timeout())
            .namespace(&self.namespace)
            .inbox_prefix(&self.nats_inbox_prefix);
        if let Some(token) = &self.nats_token {
            options = options.token(token);
        }
        if let Some(seed) = &self.nats_nkey {
            options = options.nkey(seed);
        }
        if let (Some(user), Some(password)) = (&self.nats_user, &self.nats_password) {
            options = options.user_and_password(user, password);
        }
        if let Some(path) = &self.nats_creds {
            options = options.credentials_file(path);
        }
        if let Some(path) = &self.nats_ca {
            options = options.root_certificates(path);
        }
        if let (Some(certificate), Some(key)) = (&self.nats_cert, &self.nats_key) {
            options = options.client_certificate(certificate, key);
        }
        let bus = options.bus();
        bus.check().map_err(|error| usage(&error))?;
        // The library gives every server two attempts of this length.
        let servers = self.nats_url.split(',').count();
        let limit =
            from.timeout().saturating_mul(2).saturating_mul(u32::try_from(servers).unwrap_or(u32::MAX));
        with_notice(Server::nats(&self.nats_url), limit, bus.connect()).await?;
        Ok(bus)
    }
}
