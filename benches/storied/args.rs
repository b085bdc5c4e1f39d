use std::borrow::Cow;
use std::path::PathBuf;

use storied::Codec;

/// A workload. A number is part of its name: `append-100`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Events into payloads.
    Codec(Codec),
    /// Commands over 1,000 aggregates.
    Commands,
    /// Commands on one aggregate.
    Hot,
    /// Appends of this many events each, directly to the store.
    Append(usize),
    /// A new projection over a full log.
    Catchup,
    /// The first command on an aggregate with a long stream.
    Rehydrate,
    /// Publishes a log over NATS: into a new log stream in JetStream, or over Core to a subscriber.
    Publish,
    /// Publishes a log into a new log stream in JetStream, one message after the other.
    AcksAwaited,
    /// Publishes messages into JetStream with ids for its deduplication.
    AcksDedup,
    /// Latency from an append to a projection, or over NATS to a subscriber, 200 times a second.
    Latency,
    /// Appends over NATS into a read model on another node.
    Live,
    /// Latency from an append over NATS to a read model on another node, 200 times a second.
    LiveLatency,
    /// Commands over NATS to an empty handler, on this many nodes.
    Dispatch(usize),
    /// Commands over NATS to the aggregates of this many other nodes.
    Remote(usize),
    /// Bytes of an idle live aggregate.
    MemoryIdle,
    /// Peak memory of a process in which a new projection reads a full log.
    MemoryCatchup,
    /// Commands on this many node processes.
    Scale(usize),
    /// CPU time of the server for an appended event, with this many streams.
    Cpu(usize),
    /// CPU time of this process for a command.
    CpuClient,
    /// Commands on new aggregates.
    Creations,
    /// Commands beside readers of the log.
    Mixed,
    /// Reactions of a process: an event, and a command to another aggregate.
    Reactions,
    /// Scheduled commands that are due at once.
    Scheduled,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    Memory,
    Sqlite,
    Postgres,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum BusKind {
    Local,
    Core,
    JetStream,
}

/// One row of the report.
#[derive(Clone)]
pub struct Plan {
    pub workload: Workload,
    pub store: StoreKind,
    pub bus: BusKind,
    pub callers: usize,
    pub events: usize,
    pub payload: usize,
    pub runs: usize,
}

pub struct Args {
    /// The selected workload; `append` selects `append-1` and `append-100`.
    workload: Option<String>,
    store: Option<StoreKind>,
    bus: Option<BusKind>,
    callers: Option<usize>,
    events: Option<usize>,
    payload: usize,
    runs: usize,
    pub json: Option<PathBuf>,
}

const USAGE: &str = "usage: cargo bench --bench storied -- \
[all|codec|commands|hot|append|cpu|creations|mixed|reactions|scheduled|catchup|rehydrate|publish|acks|latency|live|dispatch|remote|memory|scale]
       [--store memory|sqlite|postgres] [--bus local|core|jetstream] [--callers N] [--events N] [--payload BYTES]
       [--runs N] [--json FILE]
   or: cargo bench --bench storied -- growth MILLIONS [--long-lived] [--svg FILE]
   or: cargo bench --bench storied -- table FILE.json...   (prints what --json wrote as a table in Markdown)
codec, append, cpu, acks, live, dispatch, remote, memory and scale are several: codec-cbor, codec-json; append-1, append-100; cpu-1000, cpu-1000000 (streams),
cpu-client;
acks-awaited, acks-dedup; live, live-latency; dispatch-1 to -3 and remote-1 to -3 (nodes); memory-idle, memory-catchup; scale-2
to -4 (processes)";

impl Workload {
    const ALL: [Workload; 32] = [
        Workload::Codec(Codec::Cbor),
        Workload::Codec(Codec::Json),
        Workload::Commands,
        Workload::Hot,
        Workload::Append(1),
        Workload::Append(100),
        Workload::Cpu(1_000),
        Workload::Cpu(1_000_000),
        Workload::CpuClient,
        Workload::Creations,
        Workload::Mixed,
        Workload::Reactions,
        Workload::Scheduled,
        Workload::Catchup,
        Workload::Rehydrate,
        Workload::Publish,
        Workload::AcksAwaited,
        Workload::AcksDedup,
        Workload::Latency,
        Workload::Live,
        Workload::LiveLatency,
        Workload::Dispatch(1),
        Workload::Dispatch(2),
        Workload::Dispatch(3),
        Workload::Remote(1),
        Workload::Remote(2),
        Workload::Remote(3),
        Workload::MemoryIdle,
        Workload::MemoryCatchup,
        Workload::Scale(2),
        Workload::Scale(3),
        Workload::Scale(4),
    ];

    pub fn name(self) -> Cow<'static, str> {
        match self {
            Workload::Codec(codec) => format!("codec-{codec}").into(),
            Workload::Commands => "commands".into(),
            Workload::Hot => "hot".into(),
            Workload::Append(events) => format!("append-{events}").into(),
            Workload::Catchup => "catchup".into(),
            Workload::Rehydrate => "rehydrate".into(),
            Workload::Publish => "publish".into(),
            Workload::AcksAwaited => "acks-awaited".into(),
            Workload::AcksDedup => "acks-dedup".into(),
            Workload::Latency => "latency".into(),
            Workload::Live => "live".into(),
            Workload::LiveLatency => "live-latency".into(),
            Workload::Dispatch(nodes) => format!("dispatch-{nodes}").into(),
            Workload::Remote(nodes) => format!("remote-{nodes}").into(),
            Workload::MemoryIdle => "memory-idle".into(),
            Workload::MemoryCatchup => "memory-catchup".into(),
            Workload::Scale(nodes) => format!("scale-{nodes}").into(),
            Workload::Cpu(streams) => format!("cpu-{streams}").into(),
            Workload::CpuClient => "cpu-client".into(),
            Workload::Creations => "creations".into(),
            Workload::Mixed => "mixed".into(),
            Workload::Reactions => "reactions".into(),
            Workload::Scheduled => "scheduled".into(),
        }
    }

    /// Returns whether this workload is selected, directly or by the name of its family.
    fn is(self, wanted: &str) -> bool {
        let name = self.name();
        name.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }

    /// Returns the stores with a limit to compare.
    ///
    /// The memory store is its own limit, and keeps the log in memory. `acks` measures NATS only,
    /// `codec` no store.
    fn stores(self) -> &'static [StoreKind] {
        match self {
            Workload::Codec(_) | Workload::AcksAwaited | Workload::AcksDedup => &[StoreKind::Memory],
            Workload::Scale(_) | Workload::Cpu(_) | Workload::Live | Workload::LiveLatency => {
                &[StoreKind::Postgres]
            }
            Workload::Append(_) | Workload::Creations | Workload::Mixed | Workload::MemoryCatchup => {
                &[StoreKind::Sqlite, StoreKind::Postgres]
            }
            _ => &StoreKind::ALL,
        }
    }

    fn buses(self) -> &'static [BusKind] {
        match self {
            Workload::Publish | Workload::Live | Workload::LiveLatency => {
                &[BusKind::Core, BusKind::JetStream]
            }
            Workload::AcksAwaited | Workload::AcksDedup => &[BusKind::JetStream],
            Workload::Latency => &BusKind::ALL,
            Workload::Dispatch(_) | Workload::Remote(_) => &[BusKind::Core],
            _ => &[BusKind::Local],
        }
    }

    fn callers(self) -> &'static [usize] {
        match self {
            Workload::Commands | Workload::CpuClient | Workload::Creations | Workload::Mixed => &[64],
            Workload::Hot | Workload::Dispatch(_) | Workload::Remote(_) | Workload::Reactions => &[1, 64],
            Workload::Scale(_) => &[8],
            _ => &[1],
        }
    }

    fn events(self, store: StoreKind, callers: usize) -> usize {
        match (self, store) {
            (Workload::Hot, StoreKind::Sqlite | StoreKind::Postgres) if callers == 1 => 2_000,
            (Workload::Commands | Workload::Hot, StoreKind::Sqlite | StoreKind::Postgres) => 20_000,
            (Workload::Commands | Workload::Hot, StoreKind::Memory) => 100_000,
            (Workload::Append(events), _) => (2_000 * events).min(100_000),
            (Workload::Dispatch(_) | Workload::Remote(_), StoreKind::Memory) => 10_000.max(callers * 1_000),
            (Workload::Dispatch(_) | Workload::Remote(_), _) => 1_000.max(callers * 200),
            (Workload::Rehydrate, _) => 10_000,
            (Workload::AcksAwaited, _) => 20_000,
            (Workload::AcksDedup, _) => 100_000,
            (Workload::Latency | Workload::LiveLatency, _) => 500,
            (Workload::Live, _) => 50_000,
            (Workload::Codec(_), _) => 1_000_000,
            (Workload::Scale(_), _) => 4_000,
            (Workload::Cpu(_), _) => 60_000,
            (Workload::CpuClient, _) => 100_000,
            (Workload::Creations | Workload::Mixed, _) => 20_000,
            (Workload::Reactions, _) if callers == 1 => 500,
            (Workload::Reactions | Workload::Scheduled, _) => 20_000,
            (Workload::MemoryIdle, _) => 100_000,
            (Workload::MemoryCatchup, _) => 1_000_000,
            (Workload::Catchup | Workload::Publish, _) => 200_000,
        }
    }
}

impl StoreKind {
    const ALL: [StoreKind; 3] = [StoreKind::Memory, StoreKind::Sqlite, StoreKind::Postgres];

    pub fn name(self) -> &'static str {
        match self {
            StoreKind::Memory => "memory",
            StoreKind::Sqlite => "sqlite",
            StoreKind::Postgres => "postgres",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl BusKind {
    const ALL: [BusKind; 3] = [BusKind::Local, BusKind::Core, BusKind::JetStream];

    pub fn name(self) -> &'static str {
        match self {
            BusKind::Local => "local",
            BusKind::Core => "core",
            BusKind::JetStream => "jetstream",
        }
    }
}

impl Args {
    pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self {
            workload: None,
            store: None,
            bus: None,
            callers: None,
            events: None,
            payload: 160,
            runs: 3,
            json: None,
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value\n{USAGE}"));
            match arg.as_str() {
                "all" => parsed.workload = None,
                "--help" => return Err(USAGE.into()),
                "--store" => {
                    let name = value()?;
                    let store = StoreKind::parse(&name);
                    parsed.store = Some(store.ok_or_else(|| format!("unknown store {name:?}\n{USAGE}"))?);
                }
                "--bus" => {
                    let name = value()?;
                    let bus = BusKind::ALL.into_iter().find(|kind| kind.name() == name);
                    parsed.bus = Some(bus.ok_or_else(|| format!("unknown bus {name:?}\n{USAGE}"))?);
                }
                "--callers" => parsed.callers = Some(number(&value()?)?),
                "--events" => parsed.events = Some(number(&value()?)?),
                "--payload" => parsed.payload = number(&value()?)?,
                "--runs" => parsed.runs = number(&value()?)?,
                "--json" => parsed.json = Some(value()?.into()),
                name if Workload::ALL.into_iter().any(|workload| workload.is(name)) => {
                    parsed.workload = Some(name.into());
                }
                name => return Err(format!("unknown workload {name:?}\n{USAGE}")),
            }
        }
        Ok(parsed)
    }

    /// Returns the selected runs that are possible.
    pub fn plans(&self) -> Result<Vec<Plan>, String> {
        let mut plans = Vec::new();
        let wanted = |workload: Workload| self.workload.as_ref().is_none_or(|name| workload.is(name));
        for workload in Workload::ALL.into_iter().filter(|one| wanted(*one)) {
            let stores = workload.stores().iter().filter(|store| self.store.is_none_or(|one| one == **store));
            for store in stores.copied() {
                let buses = workload.buses().iter().filter(|bus| self.bus.is_none_or(|one| one == **bus));
                for bus in buses.copied() {
                    let callers = self.callers.map_or(workload.callers().to_vec(), |callers| vec![callers]);
                    plans.extend(callers.into_iter().map(|callers| Plan {
                        workload,
                        store,
                        bus,
                        callers,
                        events: self.events.unwrap_or(workload.events(store, callers)),
                        payload: self.payload,
                        runs: self.runs,
                    }));
                }
            }
        }
        if plans.is_empty() {
            return Err(self.nothing(wanted));
        }
        Ok(plans)
    }

    /// Returns an error with the possible runs.
    fn nothing(&self, wanted: impl Fn(Workload) -> bool) -> String {
        let asked = |name: Option<&str>| name.unwrap_or("any").to_owned();
        let mut message = format!(
            "nothing to run on store {} over bus {}:",
            asked(self.store.map(StoreKind::name)),
            asked(self.bus.map(BusKind::name))
        );
        for workload in Workload::ALL.into_iter().filter(|one| wanted(*one)) {
            let stores: Vec<_> = workload.stores().iter().map(|store| store.name()).collect();
            let buses: Vec<_> = workload.buses().iter().map(|bus| bus.name()).collect();
            message +=
                &format!("\n  {} runs on {} over {}", workload.name(), stores.join(", "), buses.join(", "));
        }
        message
    }
}

fn number(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{text:?} is not a number above 0\n{USAGE}")),
    }
}
