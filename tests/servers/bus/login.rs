//! The login reaches the connection that carries the data.

use storied::Position;
use storied::bus::{BusError, NatsOptions};

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer};

/// Publishes and receives.
pub async fn works(options: NatsOptions) -> Result<(), BusError> {
    let bus = quick(options).bus();
    bus.connect().await?;
    let store = store();
    let head = write(&store, 0, 10).await;
    let mut subscription = subscribe(&bus, &store).await;
    let mut publisher = publisher(&bus, &store).await;
    for batch in batches(&store, Position::START, 10).await {
        publisher.publish(batch).await?;
    }
    wakes(&mut subscription, head).await;
    Ok(())
}

async fn server(authorization: &str) -> NatsServer {
    let config = vec![format!("authorization {{ {authorization} }}")];
    NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::core() }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logins_are_used_and_wrong_ones_refused_without_leaking() {
    let seed = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY";
    let public = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4";
    let core = |server: &NatsServer| NatsOptions::core().url(server.url());

    let users = server("user: ann, password: right").await;
    let tokens = server("token: right").await;
    let nkeys = server(&format!("users: [{{ nkey: {public} }}]")).await;
    works(core(&users).user_and_password("ann", "right")).await.unwrap();
    works(core(&tokens).token("right")).await.unwrap();
    works(core(&nkeys).nkey(seed)).await.unwrap();
    let in_url = users.url().replace("nats://", "nats://ann:right@");
    works(NatsOptions::core().url(in_url)).await.unwrap();
    works(NatsOptions::core().url(tokens.url().replace("nats://", "nats://r%69ght@"))).await.unwrap();

    for wrong in [
        core(&users),
        core(&users).user_and_password("ann", "hidden"),
        core(&tokens).token("hidden"),
        core(&nkeys),
        core(&users).credentials_file("/there/is/no/such/file"),
        NatsOptions::core().url(users.url().replace("nats://", "nats://ann:hidden@")),
    ] {
        let error = works(wrong).await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(matches!(error, BusError::Incompatible { .. }) && !shown.contains("hidden"), "{shown}");
    }
}

/// Special characters of a URL make the start of a password look like a host.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_part_of_a_password_is_taken_for_a_server() {
    let users = server("user: ann, password: \"r,i@g/h?t#%\"").await;
    let escaped = users.url().replace("nats://", "nats://ann:r%2Ci%40g%2Fh%3Ft%23%25@");
    works(NatsOptions::core().url(format!("{escaped},{escaped}"))).await.unwrap();
    for login in [
        "kate:4321,8765",
        "kate:4321,abcd,8765",
        "kate:4321/8765",
        "kate:4321?8765",
        "kate:4321#8765",
        "kate:4321@8765:99,77",
        "kate@bob:4321/8765",
        "kate:4321%2C,8765",
        "4321,8765",
        "kate:abcd,8765",
        "kate:4321\\8765",
    ] {
        for scheme in ["nats://", "tls://", "ws://", ""] {
            let options = NatsOptions::core().url(format!("{scheme}{login}@127.0.0.1:9"));
            let bus = options.connection_timeout(std::time::Duration::from_millis(200)).bus();
            let error = bus.connect().await.unwrap_err();
            let shown = format!("{error} {error:?} {bus:?} {:?}", storied::EventBus::state(&bus));
            let told = ["4321", "8765", "abcd", "kate"].into_iter().find(|part| shown.contains(part));
            assert_eq!(told, None, "{scheme}{login}: {shown}");
        }
    }
}

/// Prints where it is connected, with the `NATS_URL` of this process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "for the order of URLs"]
async fn connect_and_print() {
    let options = NatsOptions::core();
    let bus = match std::env::var("TEST_OPTION") {
        Ok(url) => options.url(url),
        Err(_) => options,
    }
    .bus();
    let connected = bus.connect().await;
    println!("\nstate: {connected:?} {:?}", storied::EventBus::state(&bus));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_option_comes_before_the_environment_and_that_before_the_default() {
    let servers = [server("").await, server("").await];
    let told = |option: Option<&str>, environment: &str| {
        let mut command = support::test_process(module_path!(), "connect_and_print");
        command.env("NATS_URL", environment);
        if let Some(option) = option {
            command.env("TEST_OPTION", option);
        }
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let [one, two] = servers.each_ref().map(|server| server.url());
    let port = |url: &str| url.rsplit(':').next().unwrap().to_owned();
    for (option, environment, expected) in [
        (Some(one.as_str()), two.as_str(), port(&one)),
        (None, &two, port(&two)),
        (Some(""), &two, port(&two)),
        (None, "", "4222".into()),
        (Some(" "), " ", "4222".into()),
    ] {
        let told = told(option, environment);
        assert!(told.contains(&format!("127.0.0.1:{expected}")), "{option:?} {environment:?}: {told}");
    }
}
