//! The command line: verbs, flags, environment. The help texts are the reference.

mod ask;
mod observe;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use ask::{
    CatalogVerb, ForceLeaveArgs, JoinArgs, MaintArgs, NodesArgs, ServicesArgs, ServicesVerb, ValidateArgs,
};
pub(crate) use observe::{DebugArgs, EventArgs, ManArgs, MonitorArgs, RttArgs, TopArgs, WatchArgs, WatchedKind};

/// weft: a service mesh without a control plane.
#[derive(Debug, Parser)]
#[command(name = "weft", version, propagate_version = true, max_term_width = 110)]
#[command(
    after_help = "Flags may be written with one dash or two: -node web-1, --node=web-1.\nExit codes: 0 done, 1 failed, 2 wrong usage."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Runs an agent in the foreground.
    #[command(
        after_help = "Examples:\n  weft agent -dev\n  weft agent -node web-1 -data-dir /var/lib/weft -bind 10.0.0.1 -issuer ./ca/issuer-1\n  weft agent -node web-2 -data-dir /var/lib/weft -bind 10.0.0.2 -join 10.0.0.1 -token weft1-…"
    )]
    Agent(Box<AgentArgs>),
    /// Runs three agents and two echo services on loopback, and calls them through the mesh.
    #[command(after_help = "Example:\n  weft demo --once")]
    Demo(DemoArgs),
    /// Makes the mesh CA and its issuers (offline).
    #[command(subcommand)]
    Ca(CaVerb),
    /// Makes join tokens (offline), lists and revokes them.
    #[command(subcommand)]
    Token(TokenVerb),
    /// Takes back a node, a certificate or a key on every node within a second; signs with the CA directory.
    #[command(
        after_help = "Examples:\n  weft revoke web-3 -ca ./ca -reason 'disk stolen'\n  weft revoke issuer-2 -ca ./ca -http-addr 10.0.0.1:8500\n  weft revoke -list"
    )]
    Revoke(RevokeArgs),
    /// Writes and reads intentions: who may call whom.
    #[command(subcommand)]
    Intention(IntentionVerb),
    /// Writes and reads config entries.
    #[command(subcommand)]
    Config(ConfigVerb),
    /// Explains a call: which intention decides, which instance is next, certificates, health, and what would change it.
    #[command(
        after_help = "Examples:\n  weft why web db\n  weft why web api -method POST -path /v1/items -format=json"
    )]
    Why(WhyArgs),
    /// Writes every signed document of the mesh as readable text.
    #[command(after_help = "Example:\n  weft export -out mesh.json")]
    Export(ExportArgs),
    /// Brings the documents of an export to an agent, as they were signed or signed anew.
    #[command(
        after_help = "Examples:\n  weft import mesh.json\n  weft import mesh.json -sign -operator alice.operator"
    )]
    Import(ImportArgs),
    /// Lists and brings signed documents.
    #[command(subcommand)]
    Document(DocumentVerb),
    /// Lists the members of the mesh.
    #[command(after_help = "Example:\n  weft members -format=json")]
    Members(ListArgs),
    /// Joins the agent to a mesh through the given addresses.
    #[command(after_help = "Example:\n  weft join 10.0.0.1 seed.example:8301")]
    Join(JoinArgs),
    /// Makes the agent leave the mesh and stop.
    #[command(after_help = "Example:\n  weft leave -http-addr 127.0.0.2:8500")]
    Leave(ClientArgs),
    /// Makes the agent read its files again: services, checks, log level, the CA file of checks.
    #[command(
        after_help = "What takes a restart is named. A file with a problem changes nothing.\nExample:\n  weft validate /etc/weft.d && weft reload"
    )]
    Reload(ClientArgs),
    /// Takes the node or a service out of service, or back in; without a flag it shows what is out.
    #[command(
        after_help = "Examples:\n  weft maint -enable -reason 'new disk'\n  weft maint -enable -service web-1\n  weft maint -disable"
    )]
    Maint(MaintArgs),
    /// Moves a failed member to `left`.
    #[command(after_help = "Example:\n  weft force-leave -prune web-3")]
    ForceLeave(ForceLeaveArgs),
    /// Shows facts about the agent.
    #[command(after_help = "Example:\n  weft info")]
    Info(ListArgs),
    /// Prints weft's version.
    #[command(after_help = "Example:\n  weft version")]
    Version(FormatArgs),
    /// Checks config files and directories, and reports every problem.
    #[command(
        after_help = "Prints every problem with its file and line. Exit codes: 0 valid, 1 not.\nExample:\n  weft validate /etc/weft.d"
    )]
    Validate(ValidateArgs),
    /// Lists datacenters, nodes or services of the catalogue.
    #[command(subcommand)]
    Catalog(CatalogVerb),
    /// Registers and deregisters services with the agent.
    #[command(subcommand)]
    Services(ServicesVerb),
    /// Waits for changes of a view of the mesh: prints it, or runs a program at each change.
    #[command(
        after_help = "Without a program the view is printed once. A program gets it as JSON on its standard input, and its index as WEFT_INDEX.\n\nExamples:\n  weft watch -type=service -service=web -passingonly\n  weft watch -type=services -- /usr/local/bin/reload-proxy -quiet"
    )]
    Watch(WatchArgs),
    /// Fires an event to the nodes of the mesh.
    #[command(after_help = "Examples:\n  weft event -name deploy v1.4.2\n  weft event -name restart -service web")]
    Event(EventArgs),
    /// Shows the agent's log as it is written, until interrupted.
    #[command(after_help = "Example:\n  weft monitor -log-level=debug")]
    Monitor(MonitorArgs),
    /// Estimates the round trip between two nodes.
    #[command(after_help = "Examples:\n  weft rtt web-2\n  weft rtt web-1 web-2")]
    Rtt(RttArgs),
    /// Shows the requests of the agent's services as they pass: rates, failures, times.
    #[command(after_help = "Examples:\n  weft top\n  weft top -count 1 -interval 5s -format=json")]
    Top(TopArgs),
    /// Collects what helps to find a fault into a directory: members, catalogue, checks, metrics, log. No secrets.
    #[command(after_help = "Example:\n  weft debug -duration 30s -output weft-debug")]
    Debug(DebugArgs),
    /// Prints the completion script of a shell.
    #[command(
        after_help = "Examples:\n  weft completion bash > /etc/bash_completion.d/weft\n  weft completion zsh > \"${fpath[1]}/_weft\"\n  weft completion fish > ~/.config/fish/completions/weft.fish"
    )]
    Completion {
        /// The shell.
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Writes the manual pages, one a verb, into a directory.
    #[command(after_help = "Example:\n  weft man /usr/local/share/man/man1")]
    Man(ManArgs),
}

/// A shell that completes words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    /// GNU Bash, with its package bash-completion.
    Bash,
    /// Z shell.
    Zsh,
    /// fish.
    Fish,
}

/// How a listing looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// An aligned table, for people.
    #[default]
    Pretty,
    /// JSON, for programs.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
    /// How the output looks.
    #[arg(long, value_enum, default_value = "pretty")]
    pub(crate) format: Format,
}

/// Flags of every verb that talks to an agent.
#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// The agent's HTTP API: host:port, https://host:port or unix:///PATH. Default 127.0.0.1:8500.
    #[arg(long, env = "WEFT_HTTP_ADDR", value_name = "ADDR")]
    pub(crate) http_addr: Option<String>,
    /// The agent's admin token, where it asks for one.
    #[arg(long, env = "WEFT_HTTP_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// PEM file of the CA that an https agent's certificate must lead to. Default: the host's CAs.
    #[arg(long, env = "WEFT_CACERT", value_name = "FILE")]
    pub(crate) ca_file: Option<String>,
    /// Name that an https agent's certificate must have: a DNS name, or spiffe://DOMAIN/node/NAME for a node's own. Default: the host.
    #[arg(long, env = "WEFT_TLS_SERVER_NAME", value_name = "NAME")]
    pub(crate) tls_server_name: Option<String>,
    // Consul's variables, read by clap as flags that nobody types.
    #[arg(long, env = "CONSUL_CACERT", hide = true)]
    pub(crate) consul_cacert: Option<String>,
    #[arg(long, env = "CONSUL_TLS_SERVER_NAME", hide = true)]
    pub(crate) consul_tls_server_name: Option<String>,
    #[arg(long, env = "CONSUL_HTTP_ADDR", hide = true)]
    pub(crate) consul_http_addr: Option<String>,
    #[arg(long, env = "CONSUL_HTTP_TOKEN", hide = true, hide_env_values = true)]
    pub(crate) consul_http_token: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    /// Loopback, CA and state in memory, everything on: for trying things out.
    #[arg(long)]
    pub(crate) dev: bool,
    /// Config file (*.hcl, *.json); repeatable, later files win.
    #[arg(long, value_name = "FILE")]
    pub(crate) config_file: Vec<PathBuf>,
    /// Directory of config files, read in lexical order after -config-file; repeatable.
    #[arg(long, value_name = "DIR")]
    pub(crate) config_dir: Vec<PathBuf>,
    /// This node's name. Default: the host name.
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// Datacenter. Default dc1.
    #[arg(long, value_name = "NAME")]
    pub(crate) datacenter: Option<String>,
    /// Where the agent keeps identity and state; required without -dev.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<String>,
    /// Address of the mesh's UDP port. Default: this host's only private address.
    #[arg(long, value_name = "IP")]
    pub(crate) bind: Option<String>,
    /// Address that other nodes reach, if it is not -bind.
    #[arg(long, value_name = "IP")]
    pub(crate) advertise: Option<String>,
    /// Address of the HTTP API and of DNS. Default 127.0.0.1; others need an admin token.
    #[arg(long, value_name = "IP")]
    pub(crate) client: Option<String>,
    /// Mesh port (UDP). Default 8301.
    #[arg(long, value_name = "PORT")]
    pub(crate) mesh_port: Option<u16>,
    /// HTTP API port (TCP). Default 8500.
    #[arg(long, value_name = "PORT")]
    pub(crate) http_port: Option<u16>,
    /// Shared HTTP port that routes by Host (TCP); 0 is off. Default 0, with -dev 8480.
    #[arg(long, value_name = "PORT")]
    pub(crate) shared_http_port: Option<u16>,
    /// DNS port (UDP and TCP); -1 is off. Default 8600.
    #[arg(long, value_name = "PORT", allow_negative_numbers = true)]
    pub(crate) dns_port: Option<i64>,
    /// Domain of the names that DNS answers. Default weft.
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) domain: Option<String>,
    /// Second domain with the same names; '' for none. Default consul.
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) alt_domain: Option<String>,
    /// Resolver that DNS asks for all other names: IP or IP:PORT; repeatable, asked in order. Default: they are refused.
    #[arg(long, value_name = "ADDR")]
    pub(crate) recursor: Vec<String>,
    /// Seed to join through: a name, an address or host:port; repeatable, retried until one answers.
    #[arg(long, value_name = "ADDR")]
    pub(crate) join: Vec<String>,
    /// Join token of `weft token create`; needed at the first start only.
    #[arg(long, env = "WEFT_JOIN_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// File that holds the join token.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<String>,
    /// Issuer directory: this node certifies itself and newcomers.
    #[arg(long, value_name = "DIR")]
    pub(crate) issuer: Option<String>,
    /// Services that an issuer's node may serve: patterns joined by commas. Default '*'.
    #[arg(long, value_name = "SCOPE")]
    pub(crate) serve: Option<String>,
    /// Trust domain that the identity must be of.
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) trust_domain: Option<String>,
    /// Unix socket of the SPIFFE Workload API: apps fetch their certificates there. Default: off.
    #[arg(long, value_name = "PATH")]
    pub(crate) workload_socket: Option<String>,
    /// Group whose members may connect to -workload-socket. Default: the agent's user and root alone.
    #[arg(long, value_name = "GROUP")]
    pub(crate) workload_group: Option<String>,
    /// Data-plane workers, 1 to 128. Default: one per core.
    #[arg(long, value_name = "COUNT")]
    pub(crate) workers: Option<u64>,
    /// File that holds the HTTP API's admin token (16 characters or more).
    #[arg(long, value_name = "FILE")]
    pub(crate) admin_token_file: Option<String>,
    /// What is decided of calls that no intention is about: allow or deny. Default deny, with -dev allow.
    #[arg(long, value_name = "ACTION")]
    pub(crate) default_intention_policy: Option<String>,
    /// File of an operator (`weft ca operator create`): this agent signs policy for API clients with the admin token.
    #[arg(long, value_name = "FILE")]
    pub(crate) policy_authority: Option<String>,
    /// How long open streams may finish at a stop, as 10s or 1m. Default 10s.
    #[arg(long, value_name = "DURATION")]
    pub(crate) drain_timeout: Option<String>,
    /// trace, debug, info, warn, error, or levels by module: info,weft::gossip=debug. Default info.
    #[arg(long, value_name = "LEVEL")]
    pub(crate) log_level: Option<String>,
    /// Logs one JSON object a line.
    #[arg(long)]
    pub(crate) log_json: bool,
    /// Lets checks of config files run programs (script, docker).
    #[arg(long)]
    pub(crate) enable_local_script_checks: bool,
    /// Lets every check run programs: whoever may use the API then runs programs as the agent's user.
    #[arg(long)]
    pub(crate) enable_script_checks: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Ends with code 0 after the fail-over instead of running on.
    #[arg(long)]
    pub(crate) once: bool,
    /// First three numbers of the loopback addresses that the agents take.
    #[arg(long, value_name = "A.B.C", default_value = "127.0.0")]
    pub(crate) subnet: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CaVerb {
    /// Makes a root (keep its key offline), the first issuer and an operator key; never overwrites.
    ///
    /// With -root-cert the certificates lead to a root of your own: ECDSA P-256, self-signed, path length 2 or none. Its
    /// key is read where it lies and not copied. Without -root-key it stays offline: signing requests are made, and
    /// `weft ca check` says what is left to sign.
    #[command(
        after_help = "Examples:\n  weft ca init -dir ./ca -trust-domain prod.example\n  weft ca init -dir ./ca -trust-domain prod.example -root-cert corp.pem -root-key corp.key"
    )]
    Init {
        /// Directory to make.
        #[arg(long)]
        dir: PathBuf,
        /// Trust domain of all identities: lower-case letters, digits, `.`, `-`, `_`.
        #[arg(long)]
        trust_domain: String,
        /// PEM file of a root of your own.
        #[arg(long, value_name = "FILE")]
        root_cert: Option<PathBuf>,
        /// PEM file of its key.
        #[arg(long, value_name = "FILE", requires = "root_cert")]
        root_key: Option<PathBuf>,
    },
    /// Checks the certificates of a CA directory, and says what is not signed yet.
    #[command(after_help = "Example:\n  weft ca check -ca ./ca")]
    Check {
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
    },
    /// Replaces the root, with nobody interrupted: the new one is signed by the old one and spread; nodes renew under it.
    #[command(
        after_help = "Examples:\n  weft ca rotate -ca ./ca -http-addr 10.0.0.1:8500\n  weft ca rotate -ca ./ca -root-cert corp.pem -root-key corp.key\n  weft ca rotate -ca ./ca -finish"
    )]
    Rotate {
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
        /// Takes the old root back, once every node has renewed.
        #[arg(long)]
        finish: bool,
        /// With -finish: also while nodes publish under the old root. They must join again with a token.
        #[arg(long, requires = "finish")]
        force: bool,
        /// PEM file of a root of your own that shall follow.
        #[arg(long, value_name = "FILE", requires = "root_key", conflicts_with = "finish")]
        root_cert: Option<PathBuf>,
        /// PEM file of its key.
        #[arg(long, value_name = "FILE", requires = "root_cert")]
        root_key: Option<PathBuf>,
        #[command(flatten)]
        sign: SignArgs,
    },
    /// Makes, lists and revokes operators: who signs policy, and what.
    #[command(subcommand)]
    Operator(OperatorVerb),
    /// Makes issuers: two or more nodes should be able to certify newcomers.
    #[command(subcommand)]
    Issuer(IssuerVerb),
}

#[derive(Debug, Subcommand)]
pub(crate) enum OperatorVerb {
    /// Certifies an operator; its key goes into one file. Needs the root key.
    #[command(
        after_help = "Examples:\n  weft ca operator create -name alice -may 'intentions,config:web*' -ca ./ca -out alice.operator\n  weft ca operator create -name ci -may intentions:web* -ttl 720h -ca ./ca -out ci.operator"
    )]
    Create(OperatorCreateArgs),
    /// Lists the operators of a CA directory.
    #[command(after_help = "Example:\n  weft ca operator list -ca ./ca")]
    List(OperatorArgs),
    /// Takes an operator back: all that it signed is void on every node. Needs the root key.
    #[command(after_help = "Example:\n  weft ca operator revoke alice -ca ./ca -reason 'laptop stolen'")]
    Revoke(OperatorRevokeArgs),
    /// Certifies an operator's key again, with the rights that it has. Needs the root key; the operator adopts what it makes.
    #[command(after_help = "Example:\n  weft ca operator renew alice -ca ./ca -ttl 8760h")]
    Renew(OperatorRenewArgs),
    /// Puts a renewed certificate into an operator's file, after `weft ca operator renew` or `weft ca rotate`.
    #[command(after_help = "Example:\n  weft ca operator adopt ca/operators/alice.crt -operator alice.operator")]
    Adopt(OperatorAdoptArgs),
}

#[derive(Debug, Args)]
pub(crate) struct OperatorRenewArgs {
    /// Its name.
    pub(crate) name: String,
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    /// How long it is certified from now on.
    #[arg(long, default_value = "8760h")]
    pub(crate) ttl: String,
}

#[derive(Debug, Args)]
pub(crate) struct OperatorAdoptArgs {
    /// PEM file of the new certificate.
    pub(crate) certificate: PathBuf,
    /// The operator's file.
    #[arg(long, value_name = "FILE", env = "WEFT_OPERATOR")]
    pub(crate) operator: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct OperatorCreateArgs {
    /// Its name.
    #[arg(long)]
    pub(crate) name: String,
    /// What it may sign: tokens, revocations, intentions, config, joined by commas; the last three may end in :PATTERN over
    /// names (of an intention: the destination). `*` is everything.
    #[arg(long)]
    pub(crate) may: String,
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    /// File to make, with key, certificate and root.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// How long it is certified; what it signs ends with its certificate.
    #[arg(long, default_value = "8760h")]
    pub(crate) ttl: String,
}

#[derive(Debug, Args)]
pub(crate) struct OperatorArgs {
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct OperatorRevokeArgs {
    /// Its name.
    pub(crate) name: String,
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    #[command(flatten)]
    pub(crate) sign: SignArgs,
}

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
    Get(EndsArgs),
    /// Lists all intentions, the most exact first.
    #[command(after_help = "Example:\n  weft intention list -format=json")]
    List(ListArgs),
    /// Deletes an intention.
    #[command(after_help = "Example:\n  weft intention delete web db")]
    Delete(EndsArgs),
    /// Tells whether a call may pass: exits with 0 if it is allowed, 2 if it is denied, 1 if that cannot be told.
    #[command(
        after_help = "Examples:\n  weft intention check web db\n  weft intention check web api -method GET -path /v1/items"
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
    /// File with the intention (*.hcl, *.json), for permissions.
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
    /// File with the entry (*.hcl, *.json): Kind, Name, and what the kind has.
    pub(crate) file: PathBuf,
    /// Only if the version is this; 0: only if there is none.
    #[arg(long, value_name = "VERSION")]
    pub(crate) cas: Option<u64>,
    #[command(flatten)]
    pub(crate) signer: SignerArgs,
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

#[derive(Debug, Subcommand)]
pub(crate) enum IssuerVerb {
    /// Makes the next issuer directory; copy it to the node that shall use it.
    #[command(after_help = "Example:\n  weft ca issuer create -ca ./ca")]
    Create {
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
    },
    /// Lists the issuers of a CA directory, and what the mesh has heard of them.
    #[command(after_help = "Example:\n  weft ca issuer list -ca ./ca")]
    List(IssuerListArgs),
    /// Ends an issuer: it signs nothing more, what it signed stays good. For a stolen one use `weft revoke`.
    #[command(after_help = "Example:\n  weft ca issuer retire issuer-2 -ca ./ca")]
    Retire {
        /// Its name in the CA directory.
        name: String,
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
        #[command(flatten)]
        sign: SignArgs,
    },
}

/// Flags of every verb that signs a document.
#[derive(Debug, Args)]
pub(crate) struct SignArgs {
    /// Why, for other operators: at most 256 bytes.
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
    /// Writes the document to a file instead of bringing it to an agent.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Version of the document. Default: one more than the agent holds, 1 with -out.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) document_version: Option<u64>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct IssuerListArgs {
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TokenListArgs {
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RevokeArgs {
    /// Node names, serial numbers, SPKI hashes (64 hexadecimal digits), or issuers of the CA directory (issuer-2).
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// Directory of `weft ca init`: its operator key signs, or its root key.
    #[arg(long, value_name = "DIR")]
    pub(crate) ca: Option<PathBuf>,
    /// Lists what is revoked.
    #[arg(long, conflicts_with = "targets")]
    pub(crate) list: bool,
    #[command(flatten)]
    pub(crate) sign: SignArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DocumentVerb {
    /// Lists the signed documents that the mesh holds.
    #[command(after_help = "Example:\n  weft document list")]
    List(ListArgs),
    /// Brings documents that `-out` wrote to an agent.
    #[command(after_help = "Example:\n  weft document apply revoked.weft -http-addr 10.0.0.1:8500")]
    Apply(DocumentArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DocumentArgs {
    /// Files.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenVerb {
    /// Makes a token that lets a node join; it goes to standard output alone.
    #[command(after_help = "Example:\n  weft token create -ca ./ca -node 'web-*' -serve 'web,api-*' -ttl 1h")]
    Create {
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
        /// Name, or pattern of names, that the newcomer may take.
        #[arg(long)]
        node: String,
        /// Services that it may serve: patterns joined by commas. Default '' (none: it may only call).
        #[arg(long, default_value = "")]
        serve: String,
        /// How long the token is good, as 30m or 24h.
        #[arg(long, default_value = "1h")]
        ttl: String,
        /// How often it may be used; 0: as often as wanted until it ends.
        #[arg(long, default_value_t = 0)]
        uses: u32,
    },
    /// Lists the tokens that were made with a CA directory, and how often the agent, if it is an issuer, saw them used.
    #[command(after_help = "Example:\n  weft token list -ca ./ca")]
    List(TokenListArgs),
    /// Takes a token back on every issuer.
    #[command(after_help = "Example:\n  weft token revoke 1f0e…-… -ca ./ca")]
    Revoke {
        /// Its id; `weft token list` names it.
        id: String,
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
        #[command(flatten)]
        sign: SignArgs,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn consul_s_spelling_is_understood() {
        let argv = ["weft", "agent", "-node", "a", "-join=s1", "-join", "s2", "-http-port", "8501"];
        let cli = Cli::parse_from(crate::argv::normalize(argv.map(Into::into)));
        let Verb::Agent(agent) = cli.verb else { panic!("not the agent's verb") };
        assert_eq!((agent.node.as_deref(), agent.http_port), (Some("a"), Some(8501)));
        assert_eq!(agent.join, ["s1", "s2"]);
    }

    #[test]
    fn every_verb_shows_an_example() {
        #[track_caller]
        fn check(command: &clap::Command) {
            if command.get_subcommands().next().is_none() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example"), "{}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
