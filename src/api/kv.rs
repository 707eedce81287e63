//! `/v1/kv/…`: keys and values, where `kv { enabled = true }`. The last writer wins; what needs one order of writes is refused.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use serde_json::{Value, json};

use super::call::{Call, Meta, Refusal, Reply};
use super::query::ReadOptions;
use super::records::read;
use crate::gossip::{KV_VALUE_BYTES_MAX, Space, Write};
use crate::lww::{Body, Row, Scope};

/// What a value is sent as: a browser must neither run nor guess it.
const RAW: &str = "application/octet-stream";

/// What a row costs beside its key and value in an answer, in bytes.
const ROW_BYTES: usize = 256;

/// `GET /v1/kv/:key`
pub(super) async fn get(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let (keys, recurse) = (call.query.switch("keys")?, call.query.switch("recurse")?);
    let key = call.argument.clone();
    let scope = if keys || recurse { Scope::Prefix(key.clone()) } else { Scope::Key(named(&key)?) };
    let raw = call.query.switch("raw")?;
    if raw && (keys || recurse) {
        return Err(Refusal::bad("Conflicting flags: raw is for one key"));
    }
    let answer = read(&call, Space::Kv, scope, options.blocking).await?;
    let meta = Meta { index: Some(answer.index), content_hash: None };
    if answer.rows.is_empty() {
        let (status, body) = (StatusCode::NOT_FOUND, Vec::new());
        return Ok(Reply::Bytes { status, body, content_type: super::call::TEXT, meta });
    }
    // In JSON four bytes stand for three of a value.
    let value_bytes = |row: &Row| match row.body.as_ref().map_or(0, |body| body.value.len()) {
        _ if keys => 0,
        bytes if raw => bytes,
        bytes => bytes.div_ceil(3) * 4,
    };
    let bytes: usize = answer.rows.iter().map(|(name, row)| ROW_BYTES + name.len() + value_bytes(row)).sum();
    // Before it is made: there may be 16 MiB of it, and more where the configuration says so.
    let room = call.shared.room.take(bytes)?;
    let reply = if keys {
        let separator = call.query.first("separator").unwrap_or_default();
        let names = answer.rows.iter().map(|(name, _)| &**name);
        Reply::json_with(&call, &cut(names, &key, separator), meta)?
    } else if raw {
        let body = answer.rows.first().and_then(|(_, row)| row.body.as_ref()).map(|body| body.value.clone());
        let body = body.unwrap_or_default();
        Reply::Bytes { status: StatusCode::OK, body, content_type: RAW, meta }
    } else {
        let shapes: Vec<Value> = answer.rows.iter().map(|(name, row)| shape(name, row)).collect();
        Reply::json_with(&call, &shapes, meta)?
    };
    Ok(Reply::Held { reply: Box::new(reply), room })
}

/// `PUT /v1/kv/:key`: the body is the value.
pub(super) async fn put(call: Call) -> Result<Reply, Refusal> {
    let key = named(&call.argument)?;
    check(&call)?;
    let flags = match call.query.given("flags") {
        Some(text) => text.parse().map_err(|_| Refusal::bad(format!("Invalid flags: {text:?} is no number")))?,
        None => 0,
    };
    let bytes = call.body.len();
    if bytes > KV_VALUE_BYTES_MAX {
        return Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("Request body({bytes} bytes) too large, max size: {KV_VALUE_BYTES_MAX} bytes"),
        ));
    }
    let body = Body { flags, value: call.body.to_vec() };
    call.shared.records.write(Space::Kv, Write::Put { key, body }).await?;
    Reply::json(&call, &true)
}

/// `DELETE /v1/kv/:key`: what this agent knows.
pub(super) async fn delete(call: Call) -> Result<Reply, Refusal> {
    check(&call)?;
    let scope = if call.query.switch("recurse")? {
        Scope::Prefix(call.argument.clone())
    } else {
        Scope::Key(named(&call.argument)?)
    };
    call.shared.records.write(Space::Kv, Write::Delete(scope)).await?;
    Reply::json(&call, &true)
}

fn named(key: &str) -> Result<String, Refusal> {
    if key.is_empty() { Err(Refusal::bad("Missing key name")) } else { Ok(key.to_owned()) }
}

/// Refuses what a last writer that wins cannot give, and what weft has not.
fn check(call: &Call) -> Result<(), Refusal> {
    ReadOptions::parse(call)?;
    for name in ["cas", "acquire", "release"] {
        if call.query.has(name) {
            return Err(Refusal::new(
                StatusCode::NOT_IMPLEMENTED,
                format!(
                    "?{name} needs consensus; weft has none: of two agents that write at once the last writer wins, so that \
                     a compare-and-set or a lock could succeed on both"
                ),
            ));
        }
    }
    Ok(())
}

/// Cuts each of `names`, which are in order, after the first `separator` behind `prefix`; each cut name once.
fn cut<'a>(names: impl Iterator<Item = &'a str>, prefix: &str, separator: &str) -> Vec<&'a str> {
    let mut shown: Vec<&str> = Vec::new();
    for name in names {
        let rest = name.get(prefix.len()..).unwrap_or_default();
        let end = rest.find(separator).filter(|_| !separator.is_empty());
        let end = end.map_or(name.len(), |at| prefix.len() + at + separator.len());
        let name = name.get(..end).unwrap_or(name);
        if shown.last() != Some(&name) {
            shown.push(name);
        }
    }
    shown
}

fn shape(name: &str, row: &Row) -> Value {
    let body = row.body.as_deref();
    let value = body.map(|body| body.value.as_slice()).filter(|value| !value.is_empty());
    json!({
        "LockIndex": 0,
        "Key": name,
        "Flags": body.map_or(0, |body| body.flags),
        "Value": value.map(|value| STANDARD.encode(value)),
        "CreateIndex": row.created,
        "ModifyIndex": row.modified,
    })
}

#[cfg(test)]
mod tests {
    use super::super::fake::Bench;
    use super::super::held::ROOM_KIB_MAX;
    use super::*;
    use http::Method;

    #[test]
    fn keys_are_cut_at_the_separator_behind_the_prefix() {
        #[track_caller]
        fn check(prefix: &str, separator: &str, want: &[&str]) {
            let names = ["a/b/c", "a/b/d", "a/x", "aé/y"];
            let held = names.iter().copied().filter(|name| name.starts_with(prefix));
            assert_eq!(cut(held, prefix, separator), want, "{prefix:?} {separator:?}");
        }
        check("", "", &["a/b/c", "a/b/d", "a/x", "aé/y"]);
        check("", "/", &["a/", "aé/"]);
        check("a/", "/", &["a/b/", "a/x"]);
        check("a/b/c", "/", &["a/b/c"]);
        check("a", "/", &["a/", "aé/"]);
    }

    #[tokio::test]
    async fn a_value_is_written_listed_read_raw_and_deleted_in_consul_s_shapes() {
        let bench = Bench::new();
        assert_eq!(bench.put("/v1/kv/app/one?flags=7", "1").await.text, "true");
        assert_eq!(bench.put("/v1/kv/app%2Ftwo%20words", "").await.text, "true");
        let one = bench.get("/v1/kv/app/one").await;
        let index = one.index();
        let json = one.json();
        assert_eq!(json[0]["Key"], "app/one");
        assert_eq!(json[0]["Value"], "MQ==");
        assert_eq!((&json[0]["Flags"], &json[0]["LockIndex"]), (&json!(7), &json!(0)));
        assert_eq!(json[0]["ModifyIndex"], index);
        assert_eq!(bench.get("/v1/kv/app/?keys").await.json(), json!(["app/one", "app/two words"]));
        assert_eq!(bench.get("/v1/kv/?keys&separator=/").await.json(), json!(["app/"]));
        let all = bench.get("/v1/kv/app?recurse").await.json();
        assert_eq!(all[1]["Value"], Value::Null, "an empty value is null");
        assert_eq!(bench.get("/v1/kv/app/one?raw").await.text, "1");
        assert_eq!(bench.call(Method::DELETE, "/v1/kv/app/?recurse", "").await.text, "true");
        let gone = bench.get("/v1/kv/app/one").await;
        assert_eq!((gone.status, gone.text.as_str()), (StatusCode::NOT_FOUND, ""));
        assert!(gone.index() > index, "what is gone has an index to wait with");
    }

    #[tokio::test]
    async fn what_needs_one_order_of_writes_is_refused_with_the_reason() {
        let bench = Bench::new();
        for query in ["cas=0", "acquire=x", "release=x"] {
            let refused = bench.put(&format!("/v1/kv/a?{query}"), "1").await;
            assert_eq!(refused.status, StatusCode::NOT_IMPLEMENTED);
            assert!(refused.text.contains("needs consensus"), "{}", refused.text);
        }
        assert_eq!(bench.get("/v1/kv/a").await.status, StatusCode::NOT_FOUND);
        let large = bench.put("/v1/kv/a", &"x".repeat(KV_VALUE_BYTES_MAX + 1)).await;
        assert_eq!(large.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(bench.put("/v1/kv/", "1").await.status, StatusCode::BAD_REQUEST);
        assert_eq!(bench.put("/v1/kv/a?flags=x", "1").await.status, StatusCode::BAD_REQUEST);
        assert_eq!(bench.put(&format!("/v1/kv/{}", "k".repeat(513)), "1").await.status, StatusCode::BAD_REQUEST);
    }

    #[tokio::test]
    async fn a_store_that_is_full_or_off_says_what_to_do() {
        let bench = Bench::new();
        let value = "x".repeat(KV_VALUE_BYTES_MAX);
        let mut refused = None;
        for at in 0..10 {
            let answer = bench.put(&format!("/v1/kv/k{at}"), &value).await;
            if answer.status != StatusCode::OK {
                refused = Some(answer);
                break;
            }
        }
        let refused = refused.expect("the bench holds 1 MiB");
        assert_eq!(refused.status, StatusCode::INSUFFICIENT_STORAGE);
        assert!(refused.text.contains("delete some"), "{}", refused.text);
        bench.records.turn_off();
        let off = bench.get("/v1/kv/k0").await;
        assert_eq!(off.status, StatusCode::NOT_IMPLEMENTED);
        assert!(off.text.contains("kv { enabled = true }"), "{}", off.text);
    }

    #[tokio::test]
    async fn an_answer_without_room_is_refused_and_room_comes_back() {
        let bench = Bench::new();
        bench.put("/v1/kv/a", "1").await;
        for _ in 0..3 {
            assert_eq!(bench.get("/v1/kv/?recurse").await.status, StatusCode::OK);
        }
        bench.room.forget_permits(ROOM_KIB_MAX);
        let refused = bench.get("/v1/kv/?recurse").await;
        assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
        assert!(refused.text.contains("narrower prefix"), "{}", refused.text);
    }

    #[tokio::test]
    async fn an_answer_holds_its_room_until_it_has_left() {
        let bench = Bench::new();
        bench.put("/v1/kv/a", &"x".repeat(100 * 1024)).await;
        for query in ["recurse", "raw"] {
            let answer = bench.open(&format!("/v1/kv/a?{query}")).await;
            let left = bench.room.available_permits();
            assert!(left + 100 <= ROOM_KIB_MAX, "{query}: {left} while nobody has read it");
            drop(answer);
            assert_eq!(bench.room.available_permits(), ROOM_KIB_MAX, "{query}");
        }
    }

    #[tokio::test]
    async fn a_blocking_query_ends_with_a_change_under_its_own_prefix() {
        let bench = Bench::new();
        bench.put("/v1/kv/app/one", "1").await;
        let index = bench.get("/v1/kv/app/?recurse").await.index();
        let waiting = bench.get(&format!("/v1/kv/app/?recurse&index={index}&wait=60s"));
        let writing = async {
            bench.put("/v1/kv/other", "1").await;
            bench.put("/v1/kv/app/two", "2").await
        };
        let (answer, _) = tokio::join!(waiting, writing);
        assert_eq!(answer.json().as_array().unwrap().len(), 2);
        assert!(answer.index() > index);
        let late = bench.get(&format!("/v1/kv/app/?recurse&index={}&wait=10ms", answer.index())).await;
        assert_eq!(late.index(), answer.index());
        let foreign = bench.get(&format!("/v1/kv/app/one?index={}&wait=60s", u64::MAX));
        let foreign = tokio::time::timeout(std::time::Duration::from_secs(10), foreign).await;
        assert!(foreign.expect("another agent's index is answered at once").index() < u64::MAX);
    }
}
