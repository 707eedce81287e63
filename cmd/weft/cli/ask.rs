//! Verbs that ask or order a running agent, and `validate`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{ClientArgs, FormatArgs, ListArgs};

#[derive(Debug, Args)]
pub(crate) struct MembersArgs {
    /// Only members whose status matches this expression: alive, leaving, left, failed.
    #[arg(long, value_name = "REGEX")]
    pub(crate) status: Option<String>,
    /// Shows each member's tags as well.
    #[arg(long)]
    pub(crate) detailed: bool,
    /// Members of the WAN pool: none, for there is one pool.
    #[arg(long)]
    pub(crate) wan: bool,
    #[command(flatten)]
    pub(crate) list: ListArgs,
}

#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    /// Names, addresses, host:port.
    #[arg(required = true, value_name = "ADDR")]
    pub(crate) addresses: Vec<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ForceLeaveArgs {
    /// The member's name.
    pub(crate) node: String,
    /// Forgets the member and its records as well.
    #[arg(long)]
    pub(crate) prune: bool,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MaintArgs {
    /// Takes it out of service.
    #[arg(long, conflicts_with = "disable")]
    pub(crate) enable: bool,
    /// Takes it back in.
    #[arg(long)]
    pub(crate) disable: bool,
    /// The service's ID. Default: the node as a whole.
    #[arg(long, value_name = "ID")]
    pub(crate) service: Option<String>,
    /// Shown as the check's notes.
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ValidateArgs {
    /// Config files and directories, in the order in which they are merged.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// Says nothing where all is valid.
    #[arg(long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CatalogVerb {
    /// Lists the datacenters.
    #[command(after_help = "Example:\n  weft catalog datacenters")]
    Datacenters(ListArgs),
    /// Lists the nodes, or those that have a service.
    #[command(after_help = "Examples:\n  weft catalog nodes\n  weft catalog nodes -service=web -node-meta=rack=a1")]
    Nodes(NodesArgs),
    /// Lists the services with their tags, of the mesh or of a node.
    #[command(after_help = "Examples:\n  weft catalog services -format=json\n  weft catalog services -node=web-1")]
    Services(ServicesArgs),
}

#[derive(Debug, Args)]
pub(crate) struct NodesArgs {
    /// Only nodes with an instance of this service.
    #[arg(long, value_name = "NAME")]
    pub(crate) service: Option<String>,
    /// Only nodes whose meta has KEY=VALUE; repeatable.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) node_meta: Vec<String>,
    /// Of this datacenter. Default: the agent's own.
    #[arg(long, value_name = "NAME")]
    pub(crate) datacenter: Option<String>,
    /// Nearest to this node first; _agent is the agent's own.
    #[arg(long, value_name = "NODE")]
    pub(crate) near: Option<String>,
    /// Only nodes that pass this filter expression.
    #[arg(long, value_name = "EXPRESSION")]
    pub(crate) filter: Option<String>,
    /// Shows tagged addresses and meta as well.
    #[arg(long)]
    pub(crate) detailed: bool,
    #[command(flatten)]
    pub(crate) list: ListArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ServicesArgs {
    /// Only the services of this node.
    #[arg(long, value_name = "NAME", conflicts_with = "node_meta")]
    pub(crate) node: Option<String>,
    /// Only services of nodes whose meta has KEY=VALUE; repeatable.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) node_meta: Vec<String>,
    /// Of this datacenter. Default: the agent's own.
    #[arg(long, value_name = "NAME")]
    pub(crate) datacenter: Option<String>,
    // Consul's flag for what is always shown here.
    #[arg(long = "tags", hide = true)]
    pub(crate) _tags: bool,
    #[command(flatten)]
    pub(crate) list: ListArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServicesVerb {
    /// Registers every service that the files define, or one by flags.
    #[command(
        after_help = "Examples:\n  weft services register web.hcl db.json\n  weft services register -name web -port 8080 -tag v1\n  weft services register -name edge -kind ingress-gateway"
    )]
    Register(RegisterArgs),
    /// Deregisters services by their IDs, or all that files define.
    #[command(
        after_help = "Examples:\n  weft services deregister web-1\n  weft services deregister -id web-1\n  weft services deregister web.hcl db.json"
    )]
    Deregister(DeregisterArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DeregisterArgs {
    /// IDs of services, and files that define some (*.hcl, *.json; - is standard input).
    #[arg(value_name = "ID|FILE", required_unless_present = "id")]
    pub(crate) targets: Vec<String>,
    /// The service's ID, as a flag.
    #[arg(long, value_name = "ID", conflicts_with = "targets")]
    pub(crate) id: Option<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RegisterArgs {
    /// Files with service{} or services[] (*.hcl, *.json); - is standard input.
    #[arg(required_unless_present = "name", conflicts_with = "name", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Name of the service, in place of files.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Its ID. Default: its name.
    #[arg(long, requires = "name", value_name = "ID")]
    pub(crate) id: Option<String>,
    /// Its kind: ingress-gateway. Default: an app's.
    #[arg(long, requires = "name", value_name = "KIND")]
    pub(crate) kind: Option<String>,
    /// Where it is reached without the mesh. Default: the node's address.
    #[arg(long, requires = "name", value_name = "ADDRESS")]
    pub(crate) address: Option<String>,
    /// Its port.
    #[arg(long, requires = "name", value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// What it speaks: tcp, http, http2, grpc, udp. Default: tcp.
    #[arg(long, requires = "name", value_name = "PROTOCOL")]
    pub(crate) protocol: Option<String>,
    /// A tag; repeatable.
    #[arg(long, requires = "name", value_name = "TAG")]
    pub(crate) tag: Vec<String>,
    /// A pair of its meta; repeatable.
    #[arg(long, requires = "name", value_name = "KEY=VALUE")]
    pub(crate) meta: Vec<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}
