//! Verbs as scripts call them, and in the forms that Consul's users know.

use std::fs;
use std::io;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::agent::{WEFT, path, weft, weft_ok};
use crate::cli::{alone, alone_with, asked, assert_says, stderr};
use crate::netns_policy::{DENY, operator};

/// Runs a verb whose standard output leads to `out`.
#[track_caller]
fn into(out: impl Into<Stdio>, words: &[&str]) -> Output {
    Command::new(WEFT).args(words).env_remove("WEFT_HTTP_ADDR").stdout(out).output().expect("the binary starts")
}

/// Runs a verb whose standard output nobody reads.
#[track_caller]
fn unread(words: &[&str]) -> Output {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    into(writer, words)
}

#[test]
fn a_reader_that_goes_away_ends_the_printing_and_not_the_verb() {
    let (_ca, agent, at) = alone_with(239, &[DENY]);
    #[track_caller]
    fn check(out: &Output, code: i32) {
        assert_eq!((out.status.code(), stderr(out).as_str()), (Some(code), ""));
    }
    for words in [&["completion", "bash"][..], &["version"], &["members", &at], &["catalog", "services", &at]] {
        check(&unread(words), 0);
    }
    check(&unread(&["services", "register", "-name=unread", "-port=80", &at]), 0);
    assert_eq!(agent.get("/v1/agent/services")["unread"]["Service"], "unread");
    // The answer of this verb is its code.
    check(&unread(&["intention", "check", "web", "db", &at]), 2);
    // Those that print for ever end.
    let (out, _) = asked(&["line 1\nline 2\n"], |at| unread(&["monitor", at]));
    check(&out, 0);
    let (out, _) = asked(&["", ""], |at| unread(&["top", "-interval=10ms", at]));
    check(&out, 0);
}

#[test]
fn what_cannot_be_written_fails_the_verb_in_words() {
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for words in [&["completion", "zsh"][..], &["version", "-format=json"]] {
        let out = into(full(), words);
        assert_eq!(out.status.code(), Some(1), "{words:?}: {}", stderr(&out));
        assert_says(&stderr(&out), &["error: cannot write to standard output", "No space left"]);
    }
}

#[test]
fn services_are_deregistered_by_the_files_that_define_them() {
    let (_ca, agent, at) = alone(240);
    let dir = TempDir::new().unwrap();
    let [hcl, json, broken] = ["a.hcl", "b.json", "c.hcl"].map(|name| dir.path().join(name));
    fs::write(&hcl, "service {\n  name = \"one\"\n  id = \"one-1\"\n}\nservice {\n  name = \"two\"\n}\n").unwrap();
    fs::write(&json, r#"{"service": {"Name": "three", "ID": "three-1"}}"#).unwrap();
    fs::write(&broken, "service {\n").unwrap();
    let files = [path(&hcl), path(&json)];
    weft_ok(&[&["services", "register"], &files[..], &[&at]].concat());
    let registered = || {
        let services = agent.get("/v1/agent/services");
        services.as_object().unwrap().keys().cloned().collect::<Vec<String>>()
    };
    assert_eq!(registered(), ["one-1", "three-1", "two", "web-1"]);
    let refused = weft(&["services", "deregister", path(&hcl), path(&broken), &at]);
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
    assert_eq!(registered().len(), 4, "a typing error changes nothing");
    let said = weft_ok(&[&["services", "deregister", "web-1"], &files[..], &[&at]].concat());
    let lines = ["web-1", "one-1", "two", "three-1"].map(|id| format!("Deregistered service: {id}\n"));
    assert_eq!(said, lines.concat());
    assert_eq!(registered(), [""; 0]);
}

#[test]
fn lists_take_consul_s_flags_for_more_of_each_row() {
    let (_ca, agent, at) = alone(241);
    let ip = agent.api.ip().to_string();
    assert_says(&weft_ok(&["members", "-detailed", &at]), &["Tags", "alive", "dc=dc1", "role=node", &format!("{ip}:")]);
    assert_eq!(weft_ok(&["members", "-wan", &at]), "Node  Address  Status  Tags\n");
    assert_eq!(weft_ok(&["members", "-wan", "-format=json", &at]), "[]\n");
    assert_says(&weft_ok(&["catalog", "nodes", "-detailed", &at]), &["Meta", &format!("lan={ip},wan={ip}"), "rack=a1"]);
    assert_says(&weft_ok(&["catalog", "nodes", "-detailed", "-service=web", &at]), &["lan=", "rack=a1"]);
    assert_eq!(weft_ok(&["catalog", "services", "-tags", "-stale", &at]), "Service  Tags\nweb      v1\n");
}

#[test]
fn a_config_entry_is_changed_only_as_the_version_that_was_read() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("web.hcl");
    fs::write(&file, "Kind = \"service-defaults\"\nName = \"web\"\nProtocol = \"http\"\n").unwrap();
    let others = r#"{"Documents":[]}"#;
    let third = r#"{"Documents":[{"Kind":"config","Name":"service-defaults:web","Version":3,"NotAfterUnix":0,"Says":["service-defaults web"]}]}"#;
    let write = |answers: &[&str], compare: &[&str]| {
        asked(answers, |at| weft(&[&["config", "write"], compare, &[path(&file), at]].concat()))
    };
    for compare in [&["-cas", "-modify-index=3"][..], &["-cas", "3"], &["-cas=3"]] {
        let (out, seen) = write(&[others, third, "true"], compare);
        assert_eq!(out.status.code(), Some(0), "{compare:?}: {}", stderr(&out));
        assert!(seen[2].starts_with("PUT /v1/config?cas=3 "), "{compare:?}: {}", seen[2]);
    }
    let (out, _) = write(&[others, third], &["-cas", "-modify-index=2"]);
    assert_eq!(out.status.code(), Some(1));
    assert_says(&stderr(&out), &["has version 3, not 2", "decide anew"]);
    let (out, _) = write(&[others, third, "false"], &["-cas=3"]);
    assert_eq!(out.status.code(), Some(1), "another wrote it in between");
    assert_says(&stderr(&out), &["nothing was written", "decide anew"]);
    let (out, _) = write(&[], &["-cas"]);
    assert_eq!(out.status.code(), Some(2), "{}", stderr(&out));

    let words = ["config", "delete", "-kind=service-defaults", "-name=web", "-cas", "-modify-index=3"];
    let (out, seen) = asked(&[others, "{}", third, "true"], |at| weft(&[&words[..], &[at]].concat()));
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    assert!(seen[3].starts_with("DELETE /v1/config/service-defaults/web?cas=3 "), "{}", seen[3]);
}

#[test]
fn a_service_s_intentions_are_written_as_one_entry_by_an_agent_that_signs() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("db.hcl");
    let entry = "Kind = \"service-intentions\"\nName = \"db\"\nSources = [\n  {\n    Name = \"web\"\n    Action = \"allow\"\n  }\n]\n";
    fs::write(&file, entry).unwrap();
    let write = |answer: &str, more: &[&str]| {
        asked(&[answer], |at| weft(&[&["config", "write"], more, &[path(&file), at]].concat()))
    };
    let (out, seen) = write("true", &["-cas", "-modify-index=4"]);
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "Wrote config/service-intentions:db; the agent signed it.\n");
    assert!(seen[0].starts_with("PUT /v1/config?cas=4 ") && seen[0].contains(r#""Name":"web""#), "{}", seen[0]);
    let (out, _) = write("false", &["-cas=4"]);
    assert_eq!(out.status.code(), Some(1), "another wrote them");
    // An operator signs one intention at a time.
    let refused = weft(&["config", "write", "-out", path(&dir.path().join("out")), path(&file)]);
    assert_eq!(refused.status.code(), Some(1));
    assert_says(&stderr(&refused), &["weft intention create"]);
}

#[test]
fn what_was_deleted_is_listed_only_where_two_contents_of_it_were_signed() {
    let (ca, _agent, at) = alone_with(242, &[DENY]);
    let alice = operator(&ca, "alice", "intentions,config");
    let signed = ["-operator", path(&alice), &at];
    let dir = TempDir::new().unwrap();
    for name in ["web", "db"] {
        let file = dir.path().join(format!("{name}.hcl"));
        fs::write(&file, format!("Kind = \"service-defaults\"\nName = \"{name}\"\nProtocol = \"http\"\n")).unwrap();
        weft_ok(&[&["config", "write", path(&file)], &signed[..]].concat());
        weft_ok(&[&["intention", "create", "caller", name], &signed[..]].concat());
    }
    weft_ok(&[&["config", "delete", "-kind=service-defaults", "-name=db"], &signed[..]].concat());
    weft_ok(&[&["intention", "delete", "caller", "db"], &signed[..]].concat());
    let listed = weft_ok(&["config", "list", &at]);
    assert_says(&listed, &["service-defaults:web  1", "caller:web", "caller -> web: allow"]);
    assert!(!listed.contains("db"), "{listed}");
    let json = weft_ok(&["config", "list", "-format=json", &at]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let names: Vec<&str> = json.as_array().unwrap().iter().map(|one| one["Name"].as_str().unwrap()).collect();
    assert_eq!(names, ["caller:web", "service-defaults:web"]);
    // The deletions are there, as documents.
    let all = weft_ok(&["document", "list", &at]);
    assert_eq!(all.matches("deleted").count(), 2, "{all}");

    let forked = r#"{"Documents":[{"Kind":"config","Name":"service-defaults:web","Version":3,"Fork":true,"Deleted":true,"Says":["deleted"]}]}"#;
    let (out, _) = asked(&[forked], |at| weft(&["config", "list", at]));
    assert_says(&String::from_utf8_lossy(&out.stdout), &["service-defaults:web", "3 FORK", "deleted"]);
    assert_says(&stderr(&out), &["two contents of service-defaults:web"]);
}
