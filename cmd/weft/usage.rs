//! Wrong usage: clap's own words, and for what Consul's command line has and weft's has not, what stands in its place.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Prints what is wrong with `words`, the whole command line, or the help that was asked for, and ends: with 2 or 0.
pub(crate) fn end(error: &clap::Error, words: &[OsString]) -> ! {
    // Nobody may read it; the code says it too.
    let _unread = error.print();
    if let Some(hint) = hint(error) {
        eprintln!("\n{hint}");
    }
    std::process::exit(code(error, words))
}

/// The exit code: clap's, but for the verb that answers by its own, of which 2 says that a call is denied.
fn code(error: &clap::Error, words: &[OsString]) -> i32 {
    match words {
        [_, verb, of, ..] if verb == "intention" && of == "check" => error.exit_code().min(1),
        _ => error.exit_code(),
    }
}

/// Says what stands in the place of a verb or flag of Consul's.
fn hint(error: &clap::Error) -> Option<String> {
    let given = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidSubcommand => verb(given(ContextKind::InvalidSubcommand)?).map(ToOwned::to_owned),
        ErrorKind::UnknownArgument => flag(given(ContextKind::InvalidArg)?),
        ErrorKind::InvalidValue if given(ContextKind::InvalidArg)?.starts_with("--type ") => {
            view(given(ContextKind::InvalidValue)?).map(ToOwned::to_owned)
        }
        _ => None,
    }
}

/// Verbs of Consul's that weft has not.
fn verb(name: &str) -> Option<&'static str> {
    Some(match name {
        "acl" | "login" | "logout" => {
            "weft has no ACLs: `weft intention` says who may call whom, api_token who may use an agent's API."
        }
        "kv" => {
            "weft keeps keys only where kv { enabled = true } is set; then: curl 127.0.0.1:8500/v1/kv/KEY (api/README.md, \"Keys and values\")."
        }
        "lock" | "snapshot" => {
            "This needs consensus, and weft has none. `weft export` saves what operators signed (api/README.md, \"Coming from Consul\")."
        }
        "keyring" => "weft has no gossip key: `weft ca rotate` replaces the root, `weft revoke` takes a node back.",
        "tls" => {
            "`weft ca init` makes the CA, `weft token create` lets a node join: it fetches its certificates itself."
        }
        "connect" => {
            "The agent is the proxy, there is none to start: `weft services register` a service with upstreams, `weft info` shows its ports."
        }
        "exec" => {
            "weft runs nothing on other hosts. `weft event` tells them something, `weft watch` runs a program on a change."
        }
        "operator" => "There are no servers to operate: `weft info` and `weft members` show the mesh.",
        "peering" | "partition" | "namespace" => "There is one mesh, without partitions and peers.",
        "troubleshoot" => "`weft why SOURCE DESTINATION` explains a call.",
        _ => return None,
    })
}

/// Views of Consul's `watch` that weft has not.
fn view(name: &str) -> Option<&'static str> {
    Some(match name {
        "agent_service" => {
            "There is no such view: -type=service -service=NAME follows all instances; for one, ask /v1/agent/service/ID?hash=HASH."
        }
        "connect_proxy_config" => {
            "There is no proxy to configure, the agent is the proxy: `weft info` shows its listeners."
        }
        _ => return None,
    })
}

/// Flags of Consul's that weft has not.
fn flag(given: &str) -> Option<String> {
    let name = given.trim_start_matches('-').split('=').next().unwrap_or_default();
    let key = match name {
        "datacenter" => {
            return Some("Only `weft catalog nodes` and `weft catalog services` are about one datacenter.".to_owned());
        }
        "interval" | "capture" | "archive" => {
            return Some(format!("-{name} of `debug` is Consul's: weft collects everything, once, into a directory."));
        }
        "ca-path" => return Some("Give one file with -ca-file.".to_owned()),
        "namespace" | "partition" | "segment" | "peer" => {
            return Some("There is one mesh, without namespaces, partitions, segments and peers.".to_owned());
        }
        "rejoin" => "rejoin_after_leave",
        "syslog" => "enable_syslog",
        "advertise-wan" => "advertise_addr_wan",
        other => other,
    };
    let why = weft::config::without_effect(&key.replace('-', "_"))?;
    let why = why.trim_start_matches("has no effect: ");
    Some(format!("-{name} is Consul's, and would have no effect: {why}. Leave it out."))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn what_consul_has_and_weft_has_not_is_answered_with_what_stands_in_its_place() {
        #[track_caller]
        fn check(words: &str, want: Option<&str>) {
            let argv = std::iter::once("weft").chain(words.split(' ')).map(Into::into);
            let error = Cli::try_parse_from(crate::argv::normalize(argv)).expect_err(words);
            let hint = hint(&error);
            match want {
                Some(want) => assert!(hint.as_ref().is_some_and(|text| text.contains(want)), "{words}: {hint:?}"),
                None => assert_eq!(hint, None, "{words}"),
            }
        }
        check("kv get a", Some("curl"));
        check("acl token list", Some("weft intention"));
        check("keyring -list", Some("weft ca rotate"));
        check("operator raft list-peers", Some("weft members"));
        check("agent -server -data-dir /d", Some("-server is Consul's"));
        check("agent -bootstrap-expect=3", Some("weft has no servers"));
        check("agent -rejoin", Some("peers on its disk"));
        check("watch -type=agent_service", Some("/v1/agent/service/ID?hash=HASH"));
        check("watch -type connect_proxy_config", Some("weft info"));
        check("watch -type=nonsense", None);
        check("members -format=agent_service", None);
        check("agent -nod x", None);
        check("membrs", None);
        check("catalog nodes -x", None);
        check("members -datacenter=dc1", Some("weft catalog nodes"));
        check("debug -interval=1s", Some("once, into a directory"));
        check("catalog nodes -namespace=a", Some("one mesh"));
    }

    #[test]
    fn the_verb_that_answers_by_its_code_never_says_denied_of_wrong_usage() {
        #[track_caller]
        fn check(words: &str, want: i32) {
            let words = crate::argv::normalize(std::iter::once("weft").chain(words.split(' ')).map(Into::into));
            let error = Cli::try_parse_from(&words).expect_err("no command line");
            assert_eq!(code(&error, &words), want, "{words:?}");
        }
        check("intention check web", 1);
        check("intention check web db -nonsense", 1);
        check("intention check -help", 0);
        check("intention get web", 2);
        check("membrs", 2);
    }
}
