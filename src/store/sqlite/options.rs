//! The options for opening a store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::ConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{Adoption, StoreError};
use super::error::failed;
use super::schema;
use crate::codec::Codec;
use crate::invalid_option::{DAY, InvalidOption, within};

/// Options for opening a [`SqliteStore`](super::SqliteStore).
#[derive(Debug, Clone)]
pub struct SqliteOptions {
    pub(super) path: PathBuf,
    pub(super) create_if_missing: bool,
    pub(super) migrate: bool,
    pub(super) codec: Codec,
    pub(super) busy_timeout: Duration,
}

impl SqliteOptions {
    /// Describes the store in the file at `path`.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            create_if_missing: true,
            migrate: true,
            codec: Codec::default(),
            busy_timeout: Duration::from_secs(5),
        }
    }

    /// Sets whether to create a missing file.
    ///
    /// On Unix only the user of this program may read and write a created file. SQLite gives the
    /// files beside it the same rights.
    ///
    /// Default: yes. Its directory must exist.
    #[must_use]
    pub fn create_if_missing(mut self, create: bool) -> Self {
        self.create_if_missing = create;
        self
    }

    /// Sets whether to create and migrate the tables when opening.
    ///
    /// If not, missing tables and tables older than the program are an error, and a file that is
    /// not an event store is left unchanged.
    ///
    /// Default: yes.
    #[must_use]
    pub fn migrate(mut self, migrate: bool) -> Self {
        self.migrate = migrate;
        self
    }

    /// Sets the encoding of the payloads.
    ///
    /// The store keeps the codec of its creation and cannot be opened with another.
    ///
    /// Default: CBOR.
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// Sets the maximum wait for the write lock while another process holds it.
    ///
    /// Default: 5 s. Maximum: 1 day.
    #[must_use]
    pub fn busy_timeout(mut self, timeout: Duration) -> Self {
        self.busy_timeout = timeout;
        self
    }

    pub(super) fn validate(&self) -> Result<(), InvalidOption> {
        within("SqliteOptions::busy_timeout", self.busy_timeout, Duration::ZERO..=DAY)
    }

    /// Creates a missing file, if allowed, with access for this user only.
    pub(super) fn create(&self) -> Result<(), StoreError> {
        let shown = self.path.display();
        if !self.create_if_missing {
            return match self.path.try_exists() {
                Ok(false) => Err(StoreError::Incompatible {
                    expected: format!("an event store in {shown}"),
                    found: "no such file".into(),
                    advice: "check the path, or create the store with a program that may migrate".into(),
                }),
                // Opening the file reports the error.
                _ => Ok(()),
            };
        }
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        match options.open(&self.path) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(StoreError::storage(
                format!(
                    "creating {shown}: {error}; check that the directory exists and that this program may write there"
                ),
                error,
            )),
        }
    }

    /// Opens the first connection and returns it with the identity of the store.
    pub(super) async fn prepare(
        &self,
        options: &SqliteConnectOptions,
    ) -> Result<(SqliteConnection, (Uuid, Adoption)), StoreError> {
        let give_up = Instant::now() + self.busy_timeout;
        loop {
            let attempt = async {
                let doing = format!("opening {}", self.path.display());
                let mut connection = options.connect().await.map_err(|error| failed(&doing, error))?;
                let prepared = schema::prepare(&mut connection, &self.path, self.codec, self.migrate).await?;
                Ok((connection, prepared))
            };
            match attempt.await {
                // Switching a new file to WAL mode does not wait for other processes that do the
                // same.
                Err(StoreError::Unavailable { .. }) if Instant::now() < give_up => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                result => return result,
            }
        }
    }
}
