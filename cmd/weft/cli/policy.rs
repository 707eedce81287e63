//! Verbs of policy: intentions, config entries, what explains and carries them.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{ClientArgs, FormatArgs, ListArgs};
use crate::failure::Failure;

/// Flags of every verb that writes policy.
#[derive(Debug, Args)]
pub(crate) struct SignerArgs {
    /// The operator's file (`weft ca operator create`). Without one the agent signs, if it has policy_authority set.
    #[arg(long, env = "WEFT_OPERATOR", value_name = "FILE")]
    pub(crate) operator: Option<PathBuf>,
    /// Writes the document to a file instead of bringing it to an agent (`weft document apply` does that later).
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Version of the document. Default: one more than the agent holds, 1 with -out.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) document_version: Option<u64>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum IntentionVerb {
    /// Allows or denies the calls of a source to a destination.
    #[command(
        after_help = "Examples:\n  weft intention create web db\n  weft intention create -deny '*' db\n  weft intention create -file web-api.hcl -audit\n\nA file holds Consul's fields: SourceName, DestinationName, Action or Permissions."
    )]
    Create(CreateArgs),
    /// Shows one intention.
    #[command(after_help = "Example:\n  weft intention get web db")]
    Get(GetArgs),
    /// Lists all intentions, the most exact first.
    #[command(after_help = "Example:\n  weft intention list -format=json")]
    List(ListArgs),
    /// Deletes an intention.
    #[command(after_help = "Example:\n  weft intention delete web db")]
    Delete(EndsArgs),
    /// Tells whether a call may pass: exits with 0 if it is allowed, 2 if it is denied, 1 if that cannot be told.
    #[command(
        after_help = "Examples:\n  weft intention check web db\n  weft intention check web api -method GET -path /v1/items\n\nExit codes: 0 allowed, 2 denied, 1 all else, wrong usage too."
    )]
    Check(CheckArgs),
    /// Lists the intentions about a destination, or a source.
    #[command(after_help = "Examples:\n  weft intention match db\n  weft intention match -source web")]
    Match(MatchArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The caller: a service, or '*'.
    #[arg(required_unless_present = "file")]
    pub(crate) source: Option<String>,
    /// The called: a service, or '*'.
    #[arg(required_unless_present = "file")]
    pub(crate) destination: Option<String>,
    /// Allows (the default).
    #[arg(long, conflicts_with = "deny")]
    pub(crate) allow: bool,
    /// Denies.
    #[arg(long)]
    pub(crate) deny: bool,
    /// Dry run: what it would decide is logged and counted, nothing is enforced.
    #[arg(long)]
    pub(crate) audit: bool,
    /// Writes a new version of an intention that is there.
    #[arg(long)]
    pub(crate) replace: bool,
    /// File with the intention (*.hcl, *.json; - is standard input), for permissions.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// For people.
    #[arg(long)]
    pub(crate) description: Option<String>,
    /// key=value; repeatable.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) meta: Vec<String>,
    #[command(flatten)]
    pub(crate) signer: SignerArgs,
}

#[derive(Debug, Args)]
pub(crate) struct EndsArgs {
    /// The caller: a service, or '*'.
    pub(crate) source: String,
    /// The called: a service, or '*'.
    pub(crate) destination: String,
    #[command(flatten)]
    pub(crate) signer: SignerArgs,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    #[command(flatten)]
    pub(crate) ends: EndsArgs,
    // One intention is JSON in both forms.
    #[command(flatten)]
    pub(crate) _output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The caller: a service; '*' for one that nothing names.
    pub(crate) source: String,
    /// The called service.
    pub(crate) destination: String,
    /// Method of the request; without -method, -path and -header the question is about a plain stream.
    #[arg(long)]
    pub(crate) method: Option<String>,
    /// Path of the request.
    #[arg(long)]
    pub(crate) path: Option<String>,
    /// Header of the request, as name:value; repeatable.
    #[arg(long, value_name = "NAME:VALUE")]
    pub(crate) header: Vec<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

impl CheckArgs {
    /// Writes the question as a query string.
    pub(crate) fn query(&self) -> String {
        let given = [("method", &self.method), ("path", &self.path)];
        let given = given.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        let headers = self.header.iter().map(|header| ("header", header));
        let pairs =
            [("source", &self.source), ("destination", &self.destination)].into_iter().chain(given).chain(headers);
        pairs.map(|(key, value)| format!("{key}={}", crate::client::segment(value))).collect::<Vec<String>>().join("&")
    }
}

#[derive(Debug, Args)]
pub(crate) struct WhyArgs {
    #[command(flatten)]
    pub(crate) question: CheckArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MatchArgs {
    /// The service.
    pub(crate) name: String,
    /// Those about calls of it, not to it.
    #[arg(long)]
    pub(crate) source: bool,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigVerb {
    /// Writes a config entry.
    #[command(after_help = "Example:\n  weft config write web-defaults.hcl")]
    Write(ConfigWriteArgs),
    /// Shows one config entry.
    #[command(after_help = "Example:\n  weft config read -kind service-defaults -name web")]
    Read(ConfigReadArgs),
    /// Lists config entries and intentions with their versions, signers, and forks.
    #[command(after_help = "Example:\n  weft config list -kind service-defaults")]
    List(ConfigListArgs),
    /// Deletes a config entry.
    #[command(after_help = "Example:\n  weft config delete -kind service-defaults -name web")]
    Delete(ConfigDeleteArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ConfigWriteArgs {
    /// File with the entry (*.hcl, *.json; - is standard input): Kind, Name, and what the kind has.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) compare: CompareArgs,
    #[command(flatten)]
    pub(crate) signer: SignerArgs,
}

/// A change that is made only to the version that it was decided about.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// Only if the version is this; 0: only if there is none. Consul's form: -cas -modify-index=VERSION.
    #[arg(long, value_name = "VERSION", num_args = 0..=1, default_missing_value = "", conflicts_with = "out")]
    cas: Option<String>,
    /// The version, with -cas.
    #[arg(long, value_name = "VERSION", requires = "cas")]
    modify_index: Option<u64>,
}

impl CompareArgs {
    /// Returns the version that must be the present one; none: any may be.
    ///
    /// # Errors
    /// `-cas` without a version, or with two.
    pub(crate) fn version(&self) -> Result<Option<u64>, Failure> {
        let version = match (self.cas.as_deref(), self.modify_index) {
            (None, _) => return Ok(None),
            (Some(""), version) => version,
            (Some(text), None) => text.parse().ok(),
            (Some(_), Some(_)) => None,
        };
        version.map(Some).ok_or_else(|| {
            Failure::text("cannot tell the version that is to be the present one")
                .hint("give -cas VERSION, or -cas -modify-index=VERSION; 0: only if there is none")
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct ConfigReadArgs {
    /// Its kind.
    #[arg(long)]
    pub(crate) kind: String,
    /// Its name.
    #[arg(long)]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    // One entry is JSON in both forms.
    #[command(flatten)]
    pub(crate) _output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigListArgs {
    /// Of this kind alone; service-intentions are the intentions.
    #[arg(long)]
    pub(crate) kind: Option<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigDeleteArgs {
    /// Its kind.
    #[arg(long)]
    pub(crate) kind: String,
    /// Its name.
    #[arg(long)]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) compare: CompareArgs,
    #[command(flatten)]
    pub(crate) signer: SignerArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// File to write. Default: standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// File that `weft export` wrote.
    pub(crate) file: PathBuf,
    /// Signs intentions and config entries anew, as the next version of each, with the operator's file.
    #[arg(long)]
    pub(crate) sign: bool,
    #[command(flatten)]
    pub(crate) signer: SignerArgs,
}
