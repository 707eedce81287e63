//! `weft watch`: blocking queries of one view, and a program that is run at each change.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use crate::cli::{WatchArgs, WatchedKind};
use crate::client::{Client, segment};
use crate::failure::Failure;

/// How long one query waits: Consul's default.
const WAIT: Duration = Duration::from_mins(5);
/// What reads the words of a handler.
const SHELL: &str = "/bin/sh";
/// The pause after a failure, doubled by each further one up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Prints the view once, or runs a program for each of its states.
pub(crate) fn watch(args: &WatchArgs) -> Result<(), Failure> {
    let path = path(args)?;
    let client = Client::new(&args.client)?;
    let Some(handler) = Handler::of(args) else {
        println!("{:#}", shown_as(args.kind, client.get(&path)?));
        return Ok(());
    };
    let (mut index, mut pause) = (0, PAUSE);
    let mut shown: Option<Value> = None;
    loop {
        match client.get_after(&path, index, WAIT) {
            Ok((value, newest)) => {
                pause = PAUSE;
                let value = shown_as(args.kind, value);
                // Going back means another agent, or one that started anew: its state counts from the beginning.
                index = if newest < index { 0 } else { newest };
                if shown.as_ref() != Some(&value) {
                    handler.run(&value, newest)?;
                    shown = Some(value);
                }
            }
            // Nobody is there who could mend it by typing: it goes on once the agent is back.
            Err(failure) => {
                eprintln!("{failure}\n  asking again in {pause:?}");
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// What is run at each change.
#[derive(Debug, PartialEq, Eq)]
struct Handler {
    program: String,
    words: Vec<String>,
}

impl Handler {
    /// Reads the words behind the flags: as Consul's watch does, a shell reads them joined, unless `-shell=false` takes them as
    /// a program and its words.
    fn of(args: &WatchArgs) -> Option<Self> {
        let (program, words) = args.program.split_first()?;
        Some(if args.shell {
            Self { program: SHELL.to_owned(), words: vec!["-c".to_owned(), args.program.join(" ")] }
        } else {
            Self { program: program.clone(), words: words.to_vec() }
        })
    }

    /// Runs it to its end, with the state on its standard input; how it ended is reported and changes nothing.
    fn run(&self, value: &Value, index: u64) -> Result<(), Failure> {
        let (program, index) = (&self.program, index.to_string());
        let mut child = Command::new(program)
            .args(&self.words)
            .env("WEFT_INDEX", &index)
            .env("CONSUL_INDEX", &index)
            .stdin(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        if let Some(mut input) = child.stdin.take() {
            // A program that does not read its input closes it: no matter.
            let _closed = writeln!(input, "{value}");
        }
        let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
        if !status.success() {
            eprintln!("warning: {program} ended with {status}");
        }
        Ok(())
    }
}

/// Returns the view as Consul's watch shows it: one key is an object, not a list of one; what is not there is `null`.
fn shown_as(kind: WatchedKind, value: Value) -> Value {
    match (kind, value) {
        (WatchedKind::Key, Value::Array(mut one)) if one.len() == 1 => one.remove(0),
        (_, value) => value,
    }
}

/// The endpoint of the view.
fn path(args: &WatchArgs) -> Result<String, Failure> {
    let needs =
        |flag: &str, value: &Option<String>| {
            value.as_deref().filter(|value| !value.is_empty()).map(segment).ok_or_else(|| {
                Failure::text("the view is not named in full").hint(format!("give {flag} with this -type"))
            })
        };
    let instances = |group: &str| -> Result<String, Failure> {
        let tags = args.tag.iter().map(|tag| format!("tag={}", segment(tag)));
        let asked: Vec<String> = args.passingonly.then(|| "passing=1".to_owned()).into_iter().chain(tags).collect();
        let asked = if asked.is_empty() { String::new() } else { format!("?{}", asked.join("&")) };
        Ok(format!("/v1/health/{group}/{}{asked}", needs("-service", &args.service)?))
    };
    Ok(match args.kind {
        WatchedKind::Services => "/v1/catalog/services".to_owned(),
        WatchedKind::Nodes => "/v1/catalog/nodes".to_owned(),
        WatchedKind::Service => instances("service")?,
        WatchedKind::ConnectService => instances("connect")?,
        WatchedKind::Checks => match &args.service {
            Some(_) => format!("/v1/health/checks/{}", needs("-service", &args.service)?),
            None => format!("/v1/health/state/{}", segment(args.state.as_deref().unwrap_or("any"))),
        },
        WatchedKind::Event => match &args.name {
            Some(name) => format!("/v1/event/list?name={}", segment(name)),
            None => "/v1/event/list".to_owned(),
        },
        WatchedKind::ConnectRoots => "/v1/agent/connect/ca/roots".to_owned(),
        WatchedKind::ConnectLeaf => format!("/v1/agent/connect/ca/leaf/{}", needs("-service", &args.service)?),
        WatchedKind::Key => format!("/v1/kv/{}", needs("-key", &args.key)?),
        WatchedKind::Keyprefix => format!("/v1/kv/{}?recurse", needs("-prefix", &args.prefix)?),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Verb};

    #[test]
    fn each_view_is_an_endpoint_and_a_missing_name_is_said() {
        #[track_caller]
        fn check(words: &str, want: Result<&str, &str>) {
            let words = words.split(' ').map(Into::into);
            let argv = ["weft".into(), "watch".into()].into_iter().chain(words);
            let Verb::Watch(args) = Cli::parse_from(crate::argv::normalize(argv)).verb else { panic!("no watch") };
            let got = path(&args).map_err(|failure| failure.to_string());
            match want {
                Ok(want) => assert_eq!(got.as_deref(), Ok(want)),
                Err(flag) => assert!(got.as_ref().is_err_and(|text| text.contains(flag)), "{got:?}"),
            }
        }
        check("-type=services", Ok("/v1/catalog/services"));
        check("-type nodes", Ok("/v1/catalog/nodes"));
        check("-type=service -service=web", Ok("/v1/health/service/web"));
        check(
            "-type=service -service=a/b -passingonly -tag=v1 -tag=x",
            Ok("/v1/health/service/a%2Fb?passing=1&tag=v1&tag=x"),
        );
        check("-type=service", Err("-service"));
        check("-type=connect_service -service=web", Ok("/v1/health/connect/web"));
        check("-type=checks", Ok("/v1/health/state/any"));
        check("-type=checks -state=critical", Ok("/v1/health/state/critical"));
        check("-type=checks -service=web", Ok("/v1/health/checks/web"));
        check("-type=event -name=deploy", Ok("/v1/event/list?name=deploy"));
        check("-type=connect_roots", Ok("/v1/agent/connect/ca/roots"));
        check("-type=connect_leaf -service=web", Ok("/v1/agent/connect/ca/leaf/web"));
        check("-type=connect_leaf", Err("-service"));
        check("-type=key", Err("-key"));
        check("-type=keyprefix -prefix=a/", Ok("/v1/kv/a%2F?recurse"));
    }

    #[test]
    fn a_shell_reads_the_handler_s_words_unless_it_is_turned_off() {
        #[track_caller]
        fn check(flags: &[&str], program: &str, words: &[&str]) {
            let argv = ["weft", "watch", "-type=nodes"].iter().chain(flags).map(Into::into);
            let Verb::Watch(args) = Cli::parse_from(crate::argv::normalize(argv)).verb else { panic!("no watch") };
            let want = Handler { program: program.to_owned(), words: words.iter().map(ToString::to_string).collect() };
            assert_eq!(Handler::of(&args), Some(want), "{flags:?}");
        }
        check(&["--", "tee -a seen | wc"], "/bin/sh", &["-c", "tee -a seen | wc"]);
        check(&["--", "tee", "-a", "seen"], "/bin/sh", &["-c", "tee -a seen"]);
        check(&["tee", "seen"], "/bin/sh", &["-c", "tee seen"]);
        check(&["-shell=true", "--", "tee"], "/bin/sh", &["-c", "tee"]);
        check(&["-shell", "tee", "seen"], "/bin/sh", &["-c", "tee seen"]);
        check(&["-shell=false", "--", "sh", "-c", "cat; date"], "sh", &["-c", "cat; date"]);
        check(&["-shell=false", "tee", "a b"], "tee", &["a b"]);
    }

    #[test]
    fn one_key_is_an_object_and_everything_else_stays_as_it_came() {
        let row = serde_json::json!({"Key": "a"});
        let list = Value::Array(vec![row.clone()]);
        assert_eq!(shown_as(WatchedKind::Key, list.clone()), row);
        assert_eq!(shown_as(WatchedKind::Keyprefix, list.clone()), list);
        assert_eq!(shown_as(WatchedKind::Key, Value::Null), Value::Null);
    }
}
