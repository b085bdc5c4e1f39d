//! TLS, set up as docs/operations.md describes.

use std::fs;
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use storied::{ExpectedVersion, PostgresOptions, PostgresStore, StoreError};

use crate::postgres::tools::*;
use crate::support::{Certificates, PostgresServer};

#[tokio::test]
async fn the_server_is_verified() {
    let certificates = Certificates::make();
    let file = |name: &str| certificates.path(name).display().to_string();
    // This database requires client certificates.
    fs::write(
        certificates.path("hba"),
        "hostnossl mutual all all reject\nhostssl mutual all all trust clientcert=verify-ca\nhost all all all trust\n",
    )
    .unwrap();
    let settings = [
        "ssl=on".to_owned(),
        format!("ssl_cert_file={}", file("server.pem")),
        format!("ssl_key_file={}", file("server.key")),
        format!("ssl_ca_file={}", file("ca.pem")),
        format!("hba_file={}", file("hba")),
    ];
    let server = PostgresServer::start_with(&settings.each_ref().map(String::as_str)).await;
    let plain = server.create_database().await;
    run(&plain, "CREATE DATABASE mutual").await;
    let mutual = server.url().replace("/postgres", "/mutual");
    let open = async |url: &str| -> Result<PostgresStore, StoreError> {
        PostgresOptions::new().url(url).acquire_timeout(Duration::from_secs(2)).connect().await
    };
    let verified = |url: &str| format!("{url}?sslmode=verify-full&sslrootcert={}", file("ca.pem"));
    let known =
        |url: &str| format!("{}&sslcert={}&sslkey={}", verified(url), file("client.pem"), file("client.key"));

    for url in [verified(&plain), known(&mutual)] {
        let store = open(&url).await.unwrap();
        append(&store, &stream("a"), ExpectedVersion::NoStream, events(2)).await.unwrap();
        let mut operator = PgConnection::connect(&server.url()).await.unwrap();
        let ssl: Vec<bool> = sqlx::query_scalar(
            "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'storied'",
        )
        .fetch_all(&mut operator)
        .await
        .unwrap();
        assert!(!ssl.is_empty() && ssl.iter().all(|ssl| *ssl), "{ssl:?}");
    }

    let shared = PostgresServer::shared().await;
    for (wrong, says) in [
        // An untrusted certificate; one for another name; no TLS where it is required; no client
        // certificate.
        (format!("{plain}?sslmode=verify-full"), "UnknownIssuer"),
        (verified(&plain.replace("127.0.0.1", "localhost")), "not valid for name"),
        (verified(&shared.url()), "does not support TLS"),
        (verified(&mutual), "client certificate"),
        // Certificates are configured, and TLS is left to the server.
        (format!("{}?sslrootcert={}", shared.url(), file("ca.pem")), "does not support TLS"),
        (format!("{}?sslmode=prefer&sslrootcert={}", shared.url(), file("ca.pem")), "does not support TLS"),
        (
            format!("{}?sslcert={}&sslkey={}", shared.url(), file("client.pem"), file("client.key")),
            "does not support TLS",
        ),
    ] {
        let error = open(&wrong).await.map(drop).unwrap_err().to_string();
        assert!(error.contains(says), "{wrong}: {error}");
    }
}
