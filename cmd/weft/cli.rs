//! The command line: verbs, flags, environment. The help texts are the reference.

mod ask;
mod ca;
mod observe;
mod policy;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use ask::{
    CatalogVerb, DeregisterArgs, ForceLeaveArgs, JoinArgs, MaintArgs, MembersArgs, NodesArgs, RegisterArgs,
    ServicesArgs, ServicesVerb, ValidateArgs,
};
pub(crate) use ca::{
    CaListArgs, CaVerb, IssuerVerb, OperatorAdoptArgs, OperatorCreateArgs, OperatorRenewArgs, OperatorRevokeArgs,
    OperatorVerb, TokenVerb,
};
pub(crate) use observe::{DebugArgs, EventArgs, ManArgs, MonitorArgs, RttArgs, TopArgs, WatchArgs, WatchedKind};
pub(crate) use policy::{
    CheckArgs, CompareArgs, ConfigDeleteArgs, ConfigListArgs, ConfigReadArgs, ConfigVerb, ConfigWriteArgs, CreateArgs,
    EndsArgs, ExportArgs, GetArgs, ImportArgs, IntentionVerb, MatchArgs, SignerArgs, WhyArgs,
};

/// weft: a service mesh without a control plane.
#[derive(Debug, Parser)]
#[command(name = "weft", version, propagate_version = true, max_term_width = 110)]
#[command(
    after_help = "Flags may be written with one dash or two: -node web-1, --node=web-1.\nExit codes: 0 done, 1 failed, 2 wrong usage; of `weft intention check` its own."
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
    #[command(after_help = "Examples:\n  weft members -format=json\n  weft members -status 'failed|left'")]
    Members(MembersArgs),
    /// Joins the agent to a mesh through the given addresses.
    #[command(after_help = "Example:\n  weft join 10.0.0.1 seed.example:8301")]
    Join(JoinArgs),
    /// Makes the agent leave the mesh and stop.
    #[command(after_help = "Example:\n  weft leave -http-addr 127.0.0.2:8500")]
    Leave(ClientArgs),
    /// Makes the agent read its files again: services, checks, DNS, log level, the CA file of checks, the files of HTTPS.
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
    /// File that holds it; -token goes before.
    #[arg(long, env = "WEFT_HTTP_TOKEN_FILE", value_name = "FILE")]
    pub(crate) token_file: Option<String>,
    /// PEM file of the CA that an https agent's certificate must lead to. Default: the host's CAs.
    #[arg(long, env = "WEFT_CACERT", value_name = "FILE")]
    pub(crate) ca_file: Option<String>,
    /// Name that an https agent's certificate must have: a DNS name, or spiffe://DOMAIN/node/NAME for a node's own. Default: the host.
    #[arg(long, env = "WEFT_TLS_SERVER_NAME", value_name = "NAME")]
    pub(crate) tls_server_name: Option<String>,
    /// PEM file of the certificate, and its chain, that an https agent is shown where it asks for one.
    #[arg(long, env = "WEFT_CLIENT_CERT", value_name = "FILE")]
    pub(crate) client_cert: Option<String>,
    /// PEM file of its key.
    #[arg(long, env = "WEFT_CLIENT_KEY", value_name = "FILE")]
    pub(crate) client_key: Option<String>,
    // Consul's flag for what every agent does: it answers from what it knows.
    #[arg(long = "stale", hide = true)]
    pub(crate) _stale: bool,
    // Consul's variables, read by clap as flags that nobody types.
    #[arg(long, env = "CONSUL_CACERT", hide = true)]
    pub(crate) consul_cacert: Option<String>,
    #[arg(long, env = "CONSUL_TLS_SERVER_NAME", hide = true)]
    pub(crate) consul_tls_server_name: Option<String>,
    #[arg(long, env = "CONSUL_CLIENT_CERT", hide = true)]
    pub(crate) consul_client_cert: Option<String>,
    #[arg(long, env = "CONSUL_CLIENT_KEY", hide = true)]
    pub(crate) consul_client_key: Option<String>,
    #[arg(long, env = "CONSUL_HTTP_SSL", hide = true)]
    pub(crate) consul_http_ssl: Option<String>,
    // What weft does not do, so that it is refused and not passed over.
    #[arg(long, env = "CONSUL_HTTP_SSL_VERIFY", hide = true)]
    pub(crate) consul_http_ssl_verify: Option<String>,
    #[arg(long, env = "CONSUL_CAPATH", hide = true)]
    pub(crate) consul_capath: Option<String>,
    #[arg(long, env = "CONSUL_HTTP_AUTH", hide = true, hide_env_values = true)]
    pub(crate) consul_http_auth: Option<String>,
    #[arg(long, env = "CONSUL_HTTP_ADDR", hide = true)]
    pub(crate) consul_http_addr: Option<String>,
    #[arg(long, env = "CONSUL_HTTP_TOKEN", hide = true, hide_env_values = true)]
    pub(crate) consul_http_token: Option<String>,
    #[arg(long, env = "CONSUL_HTTP_TOKEN_FILE", hide = true)]
    pub(crate) consul_http_token_file: Option<String>,
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
    /// A pair of the node's meta, which other nodes see; repeatable.
    #[arg(long, value_name = "KEY:VALUE")]
    pub(crate) node_meta: Vec<String>,
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
    /// HTTP API port (TCP); -1 is off, where there is -https-port or a socket. Default 8500.
    #[arg(long, value_name = "PORT", allow_negative_numbers = true)]
    pub(crate) http_port: Option<i64>,
    /// Port of the HTTP API over TLS (TCP); -1 is off. Default: off; Consul's is 8501.
    #[arg(long, value_name = "PORT", allow_negative_numbers = true)]
    pub(crate) https_port: Option<i64>,
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
    #[arg(long, visible_alias = "retry-join", alias = "start-join", value_name = "ADDR")]
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
    /// Collector that spans and metrics are sent to by OTLP over HTTP, such as http://127.0.0.1:4318. Default: none.
    #[arg(long, value_name = "URL")]
    pub(crate) otlp_endpoint: Option<String>,
    /// Data-plane workers, 1 to 128. Default: one per core.
    #[arg(long, value_name = "COUNT")]
    pub(crate) workers: Option<u64>,
    /// File that holds `sha256:` and the digest of the HTTP API's admin token (printf %s TOKEN | sha256sum), or the token itself.
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
        let argv = ["weft", "agent", "-node", "a", "-join=s1", "-retry-join", "s2", "-http-port", "8501"];
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
