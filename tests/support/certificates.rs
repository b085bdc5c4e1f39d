//! Certificates for TLS.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Command;

use super::postgres::unprivileged;

/// Certificates and their keys.
///
/// `ca.pem` is a private authority, `server.pem` is for 127.0.0.1, `client.pem` for clients.
#[derive(Debug)]
pub struct Certificates {
    dir: tempfile::TempDir,
}

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";

impl Certificates {
    pub fn make() -> Self {
        let made = Self { dir: tempfile::TempDir::new().unwrap() };
        made.openssl(&format!("req -x509 {KEY} -days 30 -subj /CN=ca -keyout ca.key -out ca.pem"));
        for (name, extension) in
            [("server", "subjectAltName=IP:127.0.0.1"), ("client", "extendedKeyUsage=clientAuth")]
        {
            made.openssl(&format!("req {KEY} -subj /CN={name} -keyout {name}.key -out {name}.csr"));
            fs::write(made.path("extensions"), extension).unwrap();
            made.openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile extensions -out {name}.pem"
            ));
        }
        // PostgreSQL reads the keys as its own user, and rejects keys that others can read.
        fs::set_permissions(made.path("server.key"), PermissionsExt::from_mode(0o600)).unwrap();
        if let Some(user) = unprivileged() {
            for name in ["", "ca.pem", "server.pem", "server.key"] {
                chown(made.path(name), Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
            }
        }
        made
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(self.dir.path()).output();
        let output = output.expect("openssl, to make certificates");
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}
