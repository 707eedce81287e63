//! Requests that come by a gateway: whom their host means, who calls, what is changed of their heads.

use serde_json::{Value, json};

use super::routed::{counts, route, say};
use super::*;
use crate::authz::{Action, Table};

const EDGE: &str = "ingress-gateway";

fn edge(services: &Value) -> (&'static str, &'static str, Value) {
    (EDGE, "edge", json!({"Listeners": [{"Port": 80, "Protocol": "http", "Services": services}]}))
}

/// The port of the gateway `edge`, in front of a `web` that answers with the headers that it was sent.
async fn gateway(entries: &[(&str, &str, Value)]) -> Setup {
    let setup = setup().await;
    say(&setup.worker, entries);
    let port = setup.worker.listen_as(Route::Gateway { gateway: "edge".parse().unwrap(), port: 80 }).await;
    Setup { port, ..setup }
}

async fn ask(client: &mut Client<Full<Bytes>>, host: &str, path: &str) -> (StatusCode, HeaderMap, String) {
    client.ready().await.unwrap();
    let request = Request::builder().uri(path).header("host", host).body(Full::default()).unwrap();
    let response = client.send_request(request).await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    (status, headers, body_text(response).await)
}

#[test]
fn a_host_leads_to_its_service_in_the_name_of_the_gateway() {
    run(async {
        let setup = gateway(&[edge(&json!([{"Name": "web", "Hosts": ["shop.example", "*.shop.example"]}]))]).await;
        let mut client = client(setup.port).await;
        for host in ["shop.example", "SHOP.example:8080", "a.shop.example"] {
            let (status, _, body) = ask(&mut client, host, "/").await;
            assert_eq!(status, 200, "{host}: {body}");
            assert!(body.contains(&format!("host={host}")), "the host stays as it came: {body}");
        }
        let (status, headers, body) = ask(&mut client, "web.ingress.weft", "/").await;
        assert_eq!((status, &headers["x-weft-reason"]), (StatusCode::NOT_FOUND, &"unknown_host".parse().unwrap()));
        assert!(
            body.contains("Host `web.ingress.weft` names no service that ingress gateway `edge` leads to"),
            "{body}"
        );
        let series = |destination: &str, code: u16, flag: &str| {
            // Nobody was asked about a host that means nothing.
            let security = if code == 404 { "unknown" } else { "mutual_tls" };
            format!(
                "weft_http_requests_total{{connection_security=\"{security}\",destination_service=\"{destination}\",grpc_response_status=\"\",reporter=\"source\",response_code=\"{code}\",response_flags=\"{flag}\",source_service=\"edge\"}}"
            )
        };
        counts(&setup.worker, &series("web", 200, "-"), 3);
        counts(&setup.worker, &series("_unknown", 404, "NR"), 1);

        let denied =
            Snapshot { policy: Arc::new(Table::empty(Action::Deny)), ..Snapshot::clone(&setup.worker.reader.load()) };
        setup.worker.publisher.publish(Arc::new(denied));
        let (status, _, body) = ask(&mut client, "shop.example", "/").await;
        assert_eq!(status, 403, "{body}");
        assert!(body.contains("edge") && body.contains("web"), "{body}");
    });
}

#[test]
fn a_change_of_the_entry_holds_for_the_next_request_of_an_open_connection() {
    run(async {
        let setup = gateway(&[edge(&json!([{"Name": "web"}]))]).await;
        let mut client = client(setup.port).await;
        assert_eq!(ask(&mut client, "web.ingress.weft", "/").await.0, 200);
        say(&setup.worker, &[edge(&json!([{"Name": "web", "Hosts": ["new.example"]}]))]);
        assert_eq!(ask(&mut client, "web.ingress.weft", "/").await.0, 404);
        assert_eq!(ask(&mut client, "new.example", "/").await.0, 200);
        say(&setup.worker, &[]);
        assert_eq!(ask(&mut client, "new.example", "/").await.0, 404);
    });
}

#[test]
fn the_service_star_stands_for_services_that_are_there_and_take_requests() {
    run(async {
        let setup = gateway(&[edge(&json!([{"Name": "*"}]))]).await;
        let mut client = client(setup.port).await;
        assert_eq!(ask(&mut client, "web.ingress.weft", "/").await.0, 200);
        assert_eq!(ask(&mut client, "nobody.ingress.weft", "/").await.0, 404);
        say(&setup.worker, &[edge(&json!([{"Name": "*"}])), ("service-defaults", "web", json!({"Protocol": "tcp"}))]);
        assert_eq!(ask(&mut client, "web.ingress.weft", "/").await.0, 404);
    });
}

#[test]
fn a_gateway_changes_heads_and_routes_see_them_changed() {
    run(async {
        let edits = json!([{"Name": "web", "RequestHeaders": {"Set": {"x-edge": "1"}, "Remove": ["x-secret"]},
            "ResponseHeaders": {"Add": {"x-by": "edge"}, "Remove": ["date"]}}]);
        let plain = gateway(&[edge(&edits)]).await;
        let mut client = client(plain.port).await;
        let (status, headers, body) = ask(&mut client, "web.ingress.weft", "/").await;
        assert!(status == 200 && body.contains("x-edge=1"), "{status} {body}");
        assert!(headers["x-by"] == "edge", "{headers:?}");

        // With a chain: the route is chosen by the changed head, and the answer is changed as well.
        let (kind, name, _) = route(&json!({}));
        let only_edge = json!({"Routes": [
            {"Match": {"HTTP": {"Header": [{"Name": "x-edge", "Exact": "1"}]}}, "Redirect": {"Code": 302, "Path": "/edge"}}]});
        say(&plain.worker, &[edge(&edits), (kind, name, only_edge)]);
        let (status, headers, _) = ask(&mut client, "web.ingress.weft", "/").await;
        assert_eq!((status, &headers["x-by"]), (StatusCode::FOUND, &"edge".parse().unwrap()));
    });
}
