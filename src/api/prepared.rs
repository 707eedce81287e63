//! `/v1/query…`: prepared queries. Every agent holds all of them and answers by itself, from its own catalogue.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::StatusCode;
use serde_json::{Value, json};

use super::call::{Call, Meta, Refusal, Reply};
use super::near::RoundTrips;
use super::query::{Near, ReadOptions};
use super::records::read;
use super::{catalog, health};
use crate::gossip::{Space, Write};
use crate::lww::{Body, Row, Scope};
use crate::model::Instance;
use crate::prepared::{self, Book, Definition, Ends, Found};

fn all() -> Scope {
    Scope::Prefix(String::new())
}

fn unknown() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "Query not found")
}

fn shape(id: &str, row: &Row) -> Option<Value> {
    let mut shape = serde_json::to_value(prepared::decode_checked(row)?).ok()?;
    let fields = shape.as_object_mut()?;
    fields.insert("ID".to_owned(), id.into());
    fields.insert("CreateIndex".to_owned(), row.created.into());
    fields.insert("ModifyIndex".to_owned(), row.modified.into());
    Some(shape)
}

/// `GET /v1/query`
pub(super) async fn list(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let answer = read(&call, Space::Query, all(), options.blocking).await?;
    let shapes: Vec<Value> = answer.rows.iter().filter_map(|(id, row)| shape(id, row)).collect();
    Reply::json_with(&call, &shapes, Meta { index: Some(answer.index), content_hash: None })
}

/// `GET /v1/query/:id`
pub(super) async fn one(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let answer = read(&call, Space::Query, Scope::Key(call.argument.clone()), options.blocking).await?;
    let shapes: Vec<Value> = answer.rows.iter().filter_map(|(id, row)| shape(id, row)).collect();
    if shapes.is_empty() {
        return Err(unknown());
    }
    Reply::json_with(&call, &shapes, Meta { index: Some(answer.index), content_hash: None })
}

/// `POST /v1/query`
pub(super) async fn create(call: Call) -> Result<Reply, Refusal> {
    let id = uuid::Uuid::new_v4().to_string();
    put(&call, &id).await?;
    Reply::json(&call, &json!({"ID": id}))
}

/// `PUT /v1/query/:id`
pub(super) async fn update(call: Call) -> Result<Reply, Refusal> {
    if call.shared.records.read(Space::Query, Scope::Key(call.argument.clone())).await?.rows.is_empty() {
        return Err(unknown());
    }
    put(&call, &call.argument).await?;
    Ok(Reply::Empty)
}

/// `DELETE /v1/query/:id`
pub(super) async fn delete(call: Call) -> Result<Reply, Refusal> {
    call.shared.records.write(Space::Query, Write::Delete(Scope::Key(call.argument.clone()))).await?;
    Ok(Reply::Empty)
}

async fn put(call: &Call, id: &str) -> Result<(), Refusal> {
    let definition = Definition::parse(&call.body).map_err(Refusal::bad)?;
    let held = call.shared.records.read(Space::Query, all()).await?;
    if !definition.name.is_empty() && Book::of(&held.rows).is_taken(&definition.name, id) {
        return Err(Refusal::bad(format!("Invalid query: another query is named {:?}", definition.name)));
    }
    let value = serde_json::to_vec(&definition).map_err(|error| Refusal::internal(error.to_string()))?;
    let write = Write::Put { key: id.to_owned(), body: Body { flags: 0, value } };
    call.shared.records.write(Space::Query, write).await?;
    Ok(())
}

async fn found(call: &Call) -> Result<(Definition, u64), Refusal> {
    let answer = call.shared.records.read(Space::Query, all()).await?;
    let definition = Book::of(&answer.rows).find(&call.argument).ok_or_else(unknown)?;
    Ok((definition, answer.index))
}

/// `GET /v1/query/:id/explain`: the query as it is executed for this name.
pub(super) async fn explain(call: Call) -> Result<Reply, Refusal> {
    ReadOptions::parse(&call)?;
    let (definition, index) = found(&call).await?;
    let query = serde_json::to_value(definition).map_err(|error| Refusal::internal(error.to_string()))?;
    Reply::at_index(&call, &json!({"Query": query}), index)
}

/// `GET /v1/query/:id/execute`
pub(super) async fn execute(call: Call) -> Result<Reply, Refusal> {
    let mut options = ReadOptions::parse(&call)?;
    let limit = match call.query.given("limit") {
        Some(text) => text.parse().map_err(|_| Refusal::bad(format!("Invalid limit: {text:?}")))?,
        None => 0,
    };
    let (definition, _) = found(&call).await?;
    let query = &definition.service;
    let own_name = call.shared.node.name.as_str();
    // What the caller asks for goes before what the query says.
    if options.near.is_none() && (query.near == "_agent" || query.near == own_name) {
        options.near = Some(Near::Here);
    }
    let trips = RoundTrips::wanted(&call, &options).await?;
    let from_here =
        if query.failover.nearest_n > 0 { RoundTrips::now(&call).await?.into_map() } else { BTreeMap::new() };
    let is_connect = query.connect || call.query.switch("connect")?;
    let ends = if is_connect { Ends::Mesh } else { Ends::Services };
    let snapshot = call.shared.snapshot.load();
    let Found { mut instances, datacenter, failovers } =
        prepared::execute(&snapshot, query, &options.datacenter, ends, || &from_here);
    if is_connect {
        instances = instances.iter().filter_map(|owner: &Arc<Instance>| catalog::proxy(owner)).collect();
    }
    match trips {
        Some(trips) => trips.order(&mut instances, |instance| instance.node.info.name.as_str()),
        None => rand::seq::SliceRandom::shuffle(instances.as_mut_slice(), &mut rand::rng()),
    }
    if limit > 0 {
        instances.truncate(limit);
    }
    let local = call.shared.registry.state();
    let nodes: Vec<Value> = instances.iter().map(|instance| health::entry(&call.shared, instance, &local)).collect();
    let answer = json!({
        "Service": query.service,
        "Nodes": nodes,
        "DNS": {"TTL": definition.dns.ttl},
        "Datacenter": datacenter,
        "Failovers": failovers,
    });
    Reply::at_index(&call, &answer, snapshot.index)
}

#[cfg(test)]
mod tests {
    use super::super::fake::Bench;
    use super::*;
    use http::Method;

    async fn made(bench: &Bench, body: Value) -> String {
        let made = bench.call(Method::POST, "/v1/query", &body.to_string()).await.json();
        made["ID"].as_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_query_is_made_read_changed_executed_by_id_and_name_and_deleted() {
        let bench = Bench::new();
        let id = made(&bench, json!({"Name": "web-near", "service": {"service": "web", "near": "_agent"}})).await;
        let read = bench.get(&format!("/v1/query/{id}")).await.json();
        assert_eq!(read[0]["Name"], "web-near");
        assert_eq!(read[0]["Service"]["Near"], "_agent");
        for name in [id.as_str(), "web-near"] {
            let answer = bench.get(&format!("/v1/query/{name}/execute")).await.json();
            let nodes: Vec<&str> =
                answer["Nodes"].as_array().unwrap().iter().map(|node| node["Node"]["Node"].as_str().unwrap()).collect();
            assert_eq!(nodes, ["n1", "n2"], "nearest first");
            assert_eq!((&answer["Service"], &answer["Failovers"]), (&json!("web"), &json!(0)));
        }
        let one = bench.get("/v1/query/web-near/execute?limit=1").await.json();
        assert_eq!(one["Nodes"].as_array().unwrap().len(), 1);
        let changed = json!({"Name": "other", "Service": {"Service": "web", "Tags": ["!v1"]}, "DNS": {"TTL": "9s"}});
        assert_eq!(bench.put(&format!("/v1/query/{id}"), &changed.to_string()).await.status, StatusCode::OK);
        let empty = bench.get("/v1/query/other/execute").await.json();
        assert_eq!((empty["Nodes"].as_array().unwrap().len(), &empty["DNS"]["TTL"]), (0, &json!("9s")));
        assert_eq!(bench.get("/v1/query/web-near/execute").await.status, StatusCode::NOT_FOUND);
        bench.call(Method::DELETE, &format!("/v1/query/{id}"), "").await;
        assert_eq!(bench.get("/v1/query").await.json(), json!([]));
        assert_eq!(bench.get(&format!("/v1/query/{id}")).await.status, StatusCode::NOT_FOUND);
        assert_eq!(bench.put(&format!("/v1/query/{id}"), &changed.to_string()).await.status, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn a_template_takes_the_names_that_begin_so_the_longest_first() {
        let bench = Bench::new();
        let template = json!({"Type": "name_prefix_match", "Regexp": "^geo-(.*)-(.*)$"});
        made(
            &bench,
            json!({"Name": "geo-", "Template": template,
            "Service": {"Service": "${match(2)}", "Tags": ["${match(1)}"]}}),
        )
        .await;
        made(
            &bench,
            json!({"Name": "", "Template": {"Type": "name_prefix_match"},
            "Service": {"Service": "${name.full}"}}),
        )
        .await;
        let explained = bench.get("/v1/query/geo-v1-web/explain").await.json();
        assert_eq!(explained["Query"]["Service"]["Service"], "web");
        assert_eq!(explained["Query"]["Service"]["Tags"], json!(["v1"]));
        let answer = bench.get("/v1/query/geo-v1-web/execute").await.json();
        assert_eq!(answer["Nodes"].as_array().unwrap().len(), 2);
        let any = bench.get("/v1/query/web/execute").await.json();
        assert_eq!(any["Nodes"].as_array().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn an_empty_place_fails_over_to_the_next() {
        let bench = Bench::new();
        made(
            &bench,
            json!({"Name": "q", "Service": {"Service": "nobody",
            "Failover": {"Datacenters": ["dc7"], "Targets": [{"Service": "web"}]}}}),
        )
        .await;
        let answer = bench.get("/v1/query/q/execute").await.json();
        assert_eq!(answer["Failovers"], 2);
        assert_eq!(answer["Nodes"].as_array().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn what_is_no_query_is_refused_with_the_field() {
        let bench = Bench::new();
        for (body, want) in [
            (json!({"Name": "q"}), "Must provide a service name"),
            (json!({"Name": "q", "Service": {"Service": "a", "Colour": 1}}), "Colour"),
            (json!({"Name": "q", "Session": "s", "Service": {"Service": "a"}}), "session"),
            (json!({"Name": "q", "Service": {"Service": "a", "Near": "n9"}}), "Near"),
            (json!({"Name": "q", "Template": {"Type": "x"}, "Service": {"Service": "a"}}), "name_prefix_match"),
            (json!({"Name": "q", "DNS": {"TTL": "x"}, "Service": {"Service": "a"}}), "TTL"),
        ] {
            let refused = bench.call(Method::POST, "/v1/query", &body.to_string()).await;
            assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{body}");
            assert!(refused.text.contains(want), "{}", refused.text);
        }
        made(&bench, json!({"Name": "q", "Service": {"Service": "a"}})).await;
        let again = bench.call(Method::POST, "/v1/query", r#"{"Name":"q","Service":{"Service":"b"}}"#).await;
        assert_eq!(again.status, StatusCode::BAD_REQUEST);
    }
}
