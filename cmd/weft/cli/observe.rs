//! Verbs that follow the mesh, and those about the command line itself.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{ClientArgs, FormatArgs};

/// What `weft watch` watches: Consul's views.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum WatchedKind {
    /// The names of all services, with their tags.
    Services,
    /// All nodes.
    Nodes,
    /// The instances of -service.
    Service,
    /// The instances of -service that the mesh reaches.
    ConnectService,
    /// The checks of -service, or those in -state.
    Checks,
    /// The events of -name.
    Event,
    /// The roots that certificates of the mesh lead to.
    ConnectRoots,
    /// The certificate of -service, with its key.
    ConnectLeaf,
    /// One key (-key).
    Key,
    /// The keys that begin with -prefix.
    Keyprefix,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// The view.
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    pub(crate) kind: WatchedKind,
    /// Of this service: for service, connect_service, connect_leaf and checks.
    #[arg(long, value_name = "NAME")]
    pub(crate) service: Option<String>,
    /// Only instances with this tag; repeatable.
    #[arg(long, value_name = "TAG")]
    pub(crate) tag: Vec<String>,
    /// Only instances whose checks all pass.
    #[arg(long)]
    pub(crate) passingonly: bool,
    /// Only checks in this state: passing, warning, critical, any.
    #[arg(long, value_name = "STATE", conflicts_with = "service")]
    pub(crate) state: Option<String>,
    /// Events of this name.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// The key.
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// The beginning of keys.
    #[arg(long, value_name = "PREFIX")]
    pub(crate) prefix: Option<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    /// Has `/bin/sh -c` read the program's words, joined by blanks; `-shell=false` runs the first word with the others as they
    /// are.
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = true,
        default_missing_value = "true",
        num_args = 0..=1,
        require_equals = true,
        action = clap::ArgAction::Set
    )]
    pub(crate) shell: bool,
    /// Program to run at each change, with its words; write `--` before it. Without one the view is printed once.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    pub(crate) program: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct EventArgs {
    /// Its name.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: String,
    /// Only for nodes whose names match this expression.
    #[arg(long, value_name = "REGEX")]
    pub(crate) node: Option<String>,
    /// Only for nodes with a service whose name matches this expression.
    #[arg(long, value_name = "REGEX")]
    pub(crate) service: Option<String>,
    /// Only for nodes with a service that has a tag which matches this expression.
    #[arg(long, value_name = "REGEX", requires = "service")]
    pub(crate) tag: Option<String>,
    /// What it carries.
    pub(crate) payload: Option<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MonitorArgs {
    /// The least level: trace, debug, info, warn, error.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub(crate) log_level: String,
    /// One JSON object a line.
    #[arg(long)]
    pub(crate) log_json: bool,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RttArgs {
    /// A node.
    pub(crate) node: String,
    /// The other node. Default: the agent's own.
    pub(crate) other: Option<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Time between two looks: rates are of this time.
    #[arg(long, default_value = "2s", value_name = "DURATION")]
    pub(crate) interval: String,
    /// Ends after so many looks; 0: runs on.
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    pub(crate) count: u64,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DebugArgs {
    /// How long the log is followed, and the time between the first and the last look at the metrics.
    #[arg(long, default_value = "10s", value_name = "DURATION")]
    pub(crate) duration: String,
    /// Directory to make. Default: weft-debug- and the time.
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Directory for the pages; made if it is missing.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
}
