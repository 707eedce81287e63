//! The weft binary: parses the command line and hands each verb to its function.
//!
//! ```text
//!   argv -> argv::normalize -> cli::Cli -> agent | ca | revoke | verbs, watch, observe, top (over client) | shell | demo
//! ```

// First: its macros are those of all modules below.
#[macro_use]
mod output;

mod agent;
mod argv;
mod ca;
mod cli;
mod client;
mod demo;
mod failure;
mod observe;
mod policy;
mod revoke;
mod rotate;
mod shell;
mod status;
mod table;
mod tls;
mod top;
mod usage;
mod verbs;
mod watch;
mod why;

use std::process::ExitCode;

use clap::Parser as _;
use weft::pki::OwnRoot;

use crate::cli::{
    CaVerb, CatalogVerb, Cli, ConfigVerb, DocumentVerb, IntentionVerb, IssuerVerb, OperatorVerb, ServicesVerb,
    TokenVerb, Verb,
};
use crate::failure::Failure;

// 10 % of the request rate against the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let words = argv::normalize(std::env::args_os());
    let cli = Cli::try_parse_from(&words).unwrap_or_else(|error| usage::end(&error, &words));
    // The one verb whose exit code is its answer.
    if let Verb::Intention(IntentionVerb::Check(args)) = &cli.verb {
        return policy::check_intention(args);
    }
    match run(&cli.verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: &Verb) -> Result<(), Failure> {
    match verb {
        Verb::Agent(args) => agent::run(args),
        Verb::Demo(args) => demo::run(args),
        Verb::Ca(CaVerb::Init { dir, trust_domain, root_cert: None, .. }) => ca::init(dir, trust_domain),
        Verb::Ca(CaVerb::Init { dir, trust_domain, root_cert: Some(certificate), root_key }) => {
            ca::init_under(dir, trust_domain, OwnRoot { certificate, key: root_key.as_deref() })
        }
        Verb::Ca(CaVerb::Check { ca }) => ca::check(ca),
        Verb::Ca(CaVerb::Issuer(IssuerVerb::Create { ca })) => ca::create_issuer(ca),
        Verb::Ca(CaVerb::Rotate { ca, finish: false, root_cert, root_key, sign, .. }) => {
            let own = root_cert.as_deref().map(|certificate| OwnRoot { certificate, key: root_key.as_deref() });
            rotate::rotate(ca, own, sign)
        }
        Verb::Ca(CaVerb::Rotate { ca, finish: true, force, sign, .. }) => rotate::finish(ca, *force, sign),
        Verb::Ca(CaVerb::Issuer(IssuerVerb::List(args))) => revoke::list_issuers(args),
        Verb::Ca(CaVerb::Issuer(IssuerVerb::Retire { name, ca, sign })) => revoke::retire_issuer(ca, name, sign),
        Verb::Ca(CaVerb::Operator(OperatorVerb::Create(args))) => policy::create_operator(args),
        Verb::Ca(CaVerb::Operator(OperatorVerb::List(args))) => policy::list_operators(args),
        Verb::Ca(CaVerb::Operator(OperatorVerb::Revoke(args))) => policy::revoke_operator(args),
        Verb::Ca(CaVerb::Operator(OperatorVerb::Renew(args))) => policy::renew_operator(args),
        Verb::Ca(CaVerb::Operator(OperatorVerb::Adopt(args))) => policy::adopt_certificate(args),
        Verb::Intention(verb) => intention(verb),
        Verb::Config(ConfigVerb::Write(args)) => policy::write_config(args),
        Verb::Config(ConfigVerb::Read(args)) => policy::read_config(args),
        Verb::Config(ConfigVerb::List(args)) => policy::list_config(args),
        Verb::Config(ConfigVerb::Delete(args)) => policy::delete_config(args),
        Verb::Why(args) => why::why(args),
        Verb::Export(args) => policy::export(args),
        Verb::Import(args) => policy::import(args),
        Verb::Token(TokenVerb::Create { ca, node, serve, ttl, uses }) => ca::create_token(ca, node, serve, ttl, *uses),
        Verb::Token(TokenVerb::List(args)) => revoke::list_tokens(args),
        Verb::Token(TokenVerb::Revoke { id, ca, sign }) => revoke::revoke_token(ca, id, sign),
        Verb::Revoke(args) => revoke::revoke(args),
        Verb::Document(DocumentVerb::List(args)) => revoke::list_documents(args),
        Verb::Document(DocumentVerb::Apply(args)) => revoke::apply_documents(args),
        Verb::Members(args) => verbs::members(args),
        Verb::Join(args) => verbs::join(args),
        Verb::Leave(args) => verbs::leave(args),
        Verb::Maint(args) => verbs::maint(args),
        Verb::Reload(args) => verbs::reload(args),
        Verb::ForceLeave(args) => verbs::force_leave(args),
        Verb::Info(args) => verbs::info(args),
        Verb::Version(args) => {
            verbs::version(args);
            Ok(())
        }
        Verb::Validate(args) => verbs::validate(args),
        Verb::Catalog(CatalogVerb::Datacenters(args)) => verbs::datacenters(args),
        Verb::Catalog(CatalogVerb::Nodes(args)) => verbs::nodes(args),
        Verb::Catalog(CatalogVerb::Services(args)) => verbs::services(args),
        Verb::Watch(args) => watch::watch(args),
        Verb::Event(args) => observe::event(args),
        Verb::Monitor(args) => observe::monitor(args),
        Verb::Rtt(args) => observe::rtt(args),
        Verb::Debug(args) => observe::debug(args),
        Verb::Top(args) => top::top(args),
        Verb::Completion { shell } => {
            shell::completion(*shell);
            Ok(())
        }
        Verb::Man(args) => shell::man(&args.dir),
        Verb::Services(ServicesVerb::Register(args)) => verbs::register(args),
        Verb::Services(ServicesVerb::Deregister(args)) => verbs::deregister(args),
    }
}

fn intention(verb: &IntentionVerb) -> Result<(), Failure> {
    match verb {
        IntentionVerb::Create(args) => policy::create_intention(args),
        IntentionVerb::Get(args) => policy::get_intention(args),
        IntentionVerb::List(args) => policy::list_intentions(args),
        IntentionVerb::Delete(args) => policy::delete_intention(args),
        IntentionVerb::Match(args) => policy::match_intentions(args),
        // `main` answers it with its exit code.
        IntentionVerb::Check(_) => Ok(()),
    }
}
