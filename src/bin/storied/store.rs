//! `storied store adopt`.

use serde_json::json;
use storied::store::Adopt;

use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::output::Output;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Registers the new location of a moved or copied store; stop its nodes first
    Adopt(AdoptArgs),
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("original").required(true).args(["moved", "copy"])))]
pub(crate) struct AdoptArgs {
    /// The original does not exist any more: the store keeps its id
    #[arg(long)]
    moved: bool,

    /// The original still exists: the store gets a new id, and its publisher starts empty
    #[arg(long)]
    copy: bool,

    /// Assigns a new id even if the store looks like the original, as after pg_basebackup
    #[arg(long, requires = "copy")]
    force: bool,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let Command::Adopt(args) = command;
    let shown = from.database()?.shown();
    let store = from.store().await?;
    let before = store.info();
    if args.copy && before.adoption.is_adopted() && !args.force {
        return Err(Failure::Refused(format!(
            "{shown} belongs to the store {}: a new id would separate it from its read models and its bus; for a physical copy, which looks like the original, add --force",
            before.id
        )));
    }
    let adopt = if args.copy { Adopt::Copy } else { Adopt::Moved };
    let id = store.adopt(adopt).await.map_err(|error| Failure::from(error).about(&shown))?;
    if out.json {
        return out.value(&json!({ "database": shown, "store_id": id, "was": before.id }));
    }
    match adopt {
        Adopt::Moved => out.line(format!("{shown} is the store {id}; start its nodes again")),
        Adopt::Copy => out.line(format!(
            "{shown} is the store {id}, a copy of {}; give it a namespace of its own and start its nodes again",
            before.id
        )),
    }
}
