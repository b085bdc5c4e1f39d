use std::path::PathBuf;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Commands over 1,000 aggregates.
    Commands,
    /// Commands on one aggregate.
    Hot,
    /// The first command on an aggregate with a long stream.
    Rehydrate,
    /// A new projection over a full log.
    Catchup,
    /// A full log into a new mirror in JetStream.
    Publish,
    /// Appends over NATS Core to a subscriber, as many as possible.
    Deliver,
    /// From an append over NATS Core to a subscriber, 200 times a second.
    Latency,
    /// Commands on four node processes.
    Scale,
    /// Commands over NATS to a handler that does nothing.
    Dispatch,
    /// Commands over NATS to the aggregates of another node.
    Remote,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    Memory,
    Sqlite,
    Postgres,
}

/// One row of the report.
#[derive(Clone)]
pub struct Plan {
    pub workload: Workload,
    pub store: StoreKind,
    pub callers: usize,
    pub events: usize,
    pub payload: usize,
    pub runs: usize,
}

pub struct Args {
    workload: Option<Workload>,
    store: Option<StoreKind>,
    callers: Option<usize>,
    events: Option<usize>,
    payload: usize,
    runs: usize,
    pub json: Option<PathBuf>,
}

const USAGE: &str =
    "usage: cargo bench --bench storied -- [commands|hot|rehydrate|catchup|publish|deliver|latency|scale|dispatch|remote|all] [--store memory|sqlite|postgres]
       [--bus local] [--callers N] [--events N] [--payload BYTES] [--runs N] [--json FILE]";

impl Workload {
    const ALL: [Workload; 10] = [
        Workload::Commands,
        Workload::Hot,
        Workload::Rehydrate,
        Workload::Catchup,
        Workload::Publish,
        Workload::Deliver,
        Workload::Latency,
        Workload::Scale,
        Workload::Dispatch,
        Workload::Remote,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Workload::Commands => "commands",
            Workload::Hot => "hot",
            Workload::Rehydrate => "rehydrate",
            Workload::Catchup => "catchup",
            Workload::Publish => "publish",
            Workload::Deliver => "deliver",
            Workload::Latency => "latency",
            Workload::Scale => "scale",
            Workload::Dispatch => "dispatch",
            Workload::Remote => "remote",
        }
    }

    /// The bus that carries the events, or the commands.
    pub fn bus(self) -> &'static str {
        match self {
            Workload::Publish => "nats-jetstream",
            Workload::Deliver | Workload::Latency | Workload::Dispatch | Workload::Remote => "nats-core",
            _ => "local",
        }
    }

    /// Whether there is something to compare it with.
    fn runs_on(self, store: StoreKind) -> bool {
        match self {
            Workload::Scale => store == StoreKind::Postgres,
            Workload::Latency => store != StoreKind::Sqlite,
            _ => true,
        }
    }

    fn callers(self) -> &'static [usize] {
        match self {
            Workload::Commands => &[64],
            Workload::Hot | Workload::Dispatch | Workload::Remote => &[1, 64],
            Workload::Scale => &[8],
            _ => &[1],
        }
    }

    fn events(self, store: StoreKind, callers: usize) -> usize {
        match (self, store) {
            (Workload::Hot, StoreKind::Sqlite | StoreKind::Postgres) if callers == 1 => 2_000,
            (Workload::Commands | Workload::Hot, StoreKind::Sqlite | StoreKind::Postgres) => 20_000,
            (Workload::Commands | Workload::Hot, StoreKind::Memory) => 100_000,
            (Workload::Dispatch | Workload::Remote, StoreKind::Memory) => 10_000.max(callers * 1_000),
            (Workload::Dispatch | Workload::Remote, _) => 1_000.max(callers * 200),
            (Workload::Rehydrate, _) => 10_000,
            (Workload::Latency, _) => 500,
            (Workload::Scale, _) => 4_000,
            (Workload::Catchup | Workload::Publish | Workload::Deliver, _) => 200_000,
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
}

impl Args {
    pub fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self {
            workload: None,
            store: None,
            callers: None,
            events: None,
            payload: 160,
            runs: 3,
            json: None,
        };
        // cargo itself passes --bench.
        let mut args = args.filter(|arg| arg != "--bench");
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value\n{USAGE}"));
            match arg.as_str() {
                "all" => parsed.workload = None,
                "--store" => {
                    let name = value()?;
                    let store = StoreKind::ALL.into_iter().find(|kind| kind.name() == name);
                    parsed.store = Some(store.ok_or_else(|| format!("there is no store {name:?}\n{USAGE}"))?);
                }
                "--bus" => match value()?.as_str() {
                    "local" => {}
                    other => return Err(format!("there is no bus {other:?}\n{USAGE}")),
                },
                "--callers" => parsed.callers = Some(number(&value()?)?),
                "--events" => parsed.events = Some(number(&value()?)?),
                "--payload" => parsed.payload = number(&value()?)?,
                "--runs" => parsed.runs = number(&value()?)?,
                "--json" => parsed.json = Some(value()?.into()),
                "--help" => return Err(USAGE.into()),
                name => {
                    let workload = Workload::ALL.into_iter().find(|workload| workload.name() == name);
                    parsed.workload = Some(workload.ok_or_else(|| format!("{name:?} is unknown\n{USAGE}"))?);
                }
            }
        }
        Ok(parsed)
    }

    pub fn plans(&self) -> Vec<Plan> {
        let mut plans = Vec::new();
        for workload in
            Workload::ALL.into_iter().filter(|one| self.workload.is_none_or(|wanted| wanted == *one))
        {
            for store in StoreKind::ALL {
                if self.store.is_some_and(|wanted| wanted != store) || !workload.runs_on(store) {
                    continue;
                }
                let callers = self.callers.map_or(workload.callers().to_vec(), |callers| vec![callers]);
                plans.extend(callers.into_iter().map(|callers| Plan {
                    workload,
                    store,
                    callers,
                    events: self.events.unwrap_or(workload.events(store, callers)),
                    payload: self.payload,
                    runs: self.runs,
                }));
            }
        }
        plans
    }
}

fn number(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{text:?} is no number above 0\n{USAGE}")),
    }
}
