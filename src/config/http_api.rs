//! The keys of the HTTP API: `ports.http` and `https`, `addresses.http` and `https`, `tls.https` and what `verify_incoming`
//! says of it, `unix_sockets`, `admin_token` and `api_token`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Map, Value};

use super::address::ip_rule;
use super::problem::{Problem, Source, Warning};
use super::raw::{Given, Raw};
use super::{ADMIN_TOKEN_BYTES_MIN, HTTP_PORT_DEFAULT, Secret};
use crate::api::{ApiToken, Certificate, HttpsConfig, Right};
use crate::unix_socket::{SOCKET_PATH_BYTES_MAX, SocketConfig};

/// Most tokens: one for each team and tool, not one for each user. Each request is held against all.
const API_TOKENS_MAX: usize = 64;
/// Hexadecimal digits of a SHA-256 digest.
const DIGEST_DIGITS: usize = 64;

/// Begins an admin token that is written as its digest.
const DIGEST_PREFIX: &str = "sha256:";

/// What files and flags say of HTTP, HTTPS and tokens.
#[derive(Debug, Default)]
pub(crate) struct RawHttpApi {
    pub(super) http_port: Option<Given<i64>>,
    pub(super) port: Option<Given<i64>>,
    cert_file: Option<Given<String>>,
    key_file: Option<Given<String>>,
    client_ca: Option<Given<String>>,
    /// `tls.https.verify_incoming`, which goes before the others.
    verify_clients: Option<Given<bool>>,
    /// The keys that say it of every listener of Consul's.
    verify_all: Vec<Given<bool>>,
    pub(super) address: Option<Given<String>>,
    pub(super) https_address: Option<Given<String>>,
    group: Option<Given<String>>,
    pub(crate) tokens: Vec<Given<Value>>,
}

impl RawHttpApi {
    /// Takes the IP address out of `addresses.http`, if there is one: there the API listens in place of `client_addr`. What
    /// is left is a socket, or a problem.
    fn take_ip(&mut self) -> Option<(IpAddr, Given<String>)> {
        let given = self.address.take()?;
        let mut words: Vec<&str> = given.value.split_whitespace().collect();
        let ip = words.iter().position(|word| word.parse::<IpAddr>().is_ok()).map(|at| words.remove(at).to_owned());
        if !words.is_empty() || ip.is_none() {
            self.address = Some(Given { value: words.join(" "), ..given.clone() });
        }
        let ip = ip?;
        Some((ip.parse().ok()?, Given { value: ip, ..given }))
    }
}

impl Raw {
    /// Takes `ports.http` or `ports.https`; as with Consul, -1 turns it off.
    pub(super) fn add_api_port(
        &mut self,
        source: &Source,
        key: &str,
        value: &Value,
        slot: fn(&mut Self) -> &mut Option<Given<i64>>,
    ) {
        match value.as_i64() {
            Some(port) => *slot(self) = Some(Given { value: port, source: source.clone(), key: key.to_owned() }),
            None => self.mistyped(source, key, value, "must be a whole number"),
        }
    }

    /// Takes a key that asks for the certificates of all clients; between agents they are always shown.
    pub(super) fn add_verify_incoming(&mut self, source: &Source, key: &str, value: &Value) {
        match value.as_bool() {
            Some(value) => {
                self.http_api.verify_all.retain(|given| given.key != key);
                self.http_api.verify_all.push(Given { value, source: source.clone(), key: key.to_owned() });
            }
            None => self.mistyped(source, key, value, "must be true or false"),
        }
    }

    /// Takes the block `unix_sockets`, of which weft has `group`.
    pub(super) fn add_unix_sockets(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "unix_sockets", &value, "must be a block of texts");
        };
        for (name, value) in map {
            let key = format!("unix_sockets.{name}");
            match name.as_str() {
                "group" => self.text(source, &key, value, |raw| &mut raw.http_api.group),
                "user" | "mode" => {
                    self.warn(
                        source,
                        &key,
                        "has no effect: the socket is the agent's user's, and its group's if unix_sockets.group is set",
                    );
                }
                _ => self.unknown(source, &key),
            }
        }
    }

    /// Takes what `tls.https` says of certificates, the agent's and its clients', out of its block.
    pub(super) fn add_https_block(&mut self, source: &Source, block: &mut Map<String, Value>) {
        if let Some(value) = block.remove("ca_file") {
            self.text(source, "tls.https.ca_file", value, |raw| &mut raw.http_api.client_ca);
        }
        if let Some(value) = block.remove("verify_incoming") {
            self.switch(source, "tls.https.verify_incoming", &value, |raw| &mut raw.http_api.verify_clients);
        }
        if let Some(value) = block.remove("cert_file") {
            self.text(source, "tls.https.cert_file", value, |raw| &mut raw.http_api.cert_file);
        }
        if let Some(value) = block.remove("key_file") {
            self.text(source, "tls.https.key_file", value, |raw| &mut raw.http_api.key_file);
        }
    }
}

/// An address of the API with the setting that says so, unless it is a default.
pub(super) type Place = (SocketAddr, Option<Given<String>>);

/// Resolves where plain HTTP is served; none where `ports.http` is -1, or a socket stands in its place.
pub(super) fn http(
    raw: &mut RawHttpApi,
    client: IpAddr,
    client_given: Option<&Given<String>>,
    problems: &mut Vec<Problem>,
) -> Option<Place> {
    let own = raw.take_ip();
    let port = match &raw.http_port {
        None => HTTP_PORT_DEFAULT,
        Some(given) if given.value == -1 => {
            if raw.address.is_none() && raw.port.as_ref().is_none_or(|https| https.value == -1) {
                let rule = "leaves the agent without an API: name ports.https too, or addresses.http = \"unix:///…\"";
                problems.push(given.problem(rule));
            }
            return None;
        }
        Some(given) => match u16::try_from(given.value) {
            Ok(port) if port > 0 => port,
            _ => {
                problems.push(given.problem("must be a port, 1 to 65535, or -1 to turn it off"));
                return None;
            }
        },
    };
    match own {
        Some((ip, given)) => Some((SocketAddr::new(ip, port), Some(given))),
        None if raw.address.is_some() => None,
        None => Some((SocketAddr::new(client, port), client_given.cloned())),
    }
}

/// Resolves where HTTPS is served; none if it is off, as it is unless a port is named. `ca` is `tls.defaults.ca_file`, which
/// holds for HTTPS too where `tls.https` has none of its own.
pub(super) fn https(
    raw: &RawHttpApi,
    client: IpAddr,
    ca: Option<&Given<String>>,
    problems: &mut Vec<Problem>,
) -> Option<HttpsConfig> {
    let certificate = match (&raw.cert_file, &raw.key_file) {
        (Some(chain), Some(key)) => {
            for given in [chain, key] {
                if !PathBuf::from(&given.value).is_file() {
                    problems.push(given.problem("must be a file in PEM"));
                }
            }
            Certificate::Files { chain: PathBuf::from(&chain.value), key: PathBuf::from(&key.value) }
        }
        (None, None) => Certificate::Own,
        (Some(given), None) => {
            problems.push(given.problem("needs tls.https.key_file too"));
            Certificate::Own
        }
        (None, Some(given)) => {
            problems.push(given.problem("needs tls.https.cert_file too"));
            Certificate::Own
        }
    };
    let ip = raw.https_address.as_ref().map_or(Some(client), |given| {
        let ip = given.value.parse().ok();
        if ip.is_none() {
            problems.push(given.problem(ip_rule(&given.value)));
        }
        ip
    });
    let client_ca = client_ca(raw, ca, problems);
    let port = raw.port.as_ref()?;
    match u16::try_from(port.value) {
        Ok(number) if number > 0 => Some(HttpsConfig { addr: SocketAddr::new(ip?, number), certificate, client_ca }),
        _ if port.value == -1 => None,
        _ => {
            problems.push(port.problem("must be a port, 1 to 65535, or -1 to turn it off; Consul's is 8501"));
            None
        }
    }
}

/// Resolves which certificates clients of HTTPS must show one of; none where they need not.
fn client_ca(raw: &RawHttpApi, ca: Option<&Given<String>>, problems: &mut Vec<Problem>) -> Option<PathBuf> {
    let asked = match &raw.verify_clients {
        Some(given) => given.value.then_some(given),
        None => raw.verify_all.iter().find(|given| given.value),
    };
    let own = raw.client_ca.as_ref();
    problems.extend(own.and_then(not_certificates));
    match (asked?, own.or(ca)) {
        (_, Some(ca)) => Some(PathBuf::from(&ca.value)),
        // Between agents it holds always: where there is no HTTPS it asks for nothing.
        (_, None) if raw.port.as_ref().is_none_or(|port| port.value == -1) => None,
        (given, None) => {
            problems
                .push(given.problem("needs tls.https.ca_file too: the PEM file of the CA whose clients HTTPS lets in"));
            None
        }
    }
}

/// What is said of HTTPS's clients without effect.
pub(super) fn idle(raw: &RawHttpApi, https: Option<&HttpsConfig>) -> Vec<Warning> {
    fn warning<T>(given: &Given<T>, text: &str) -> Warning {
        Warning { source: given.source.clone(), key: given.key.clone(), text: text.to_owned() }
    }
    let asked = raw.verify_clients.iter().chain(&raw.verify_all).filter(|given| given.value);
    let no_https = "has no effect: there is no HTTPS (ports.https), and between agents there is mutual TLS always";
    match https {
        None => asked.map(|given| warning(given, no_https)).collect(),
        Some(https) if https.client_ca.is_none() => {
            let idle = "has no effect: without tls.https.verify_incoming = true clients show no certificate";
            raw.client_ca.iter().map(|given| warning(given, idle)).collect()
        }
        Some(_) => Vec::new(),
    }
}

/// Says what is wrong with a file that is to hold certificates.
pub(super) fn not_certificates(given: &Given<String>) -> Option<Problem> {
    match CertificateDer::pem_file_iter(&given.value).map(|mut found| found.next()) {
        Ok(Some(Ok(_))) => None,
        Ok(Some(Err(error))) => Some(given.problem(format!("is no file of certificates in PEM: {error}"))),
        Ok(None) => Some(given.problem("holds no certificate in PEM")),
        Err(error) => Some(given.problem(format!("cannot be read: {error}"))),
    }
}

/// Notes the first of `places` that others reach, where no token tells them apart.
pub(super) fn refuse_open(places: &[Option<Place>], problems: &mut Vec<Problem>) {
    let open = places.iter().flatten().filter(|(addr, _)| !addr.ip().is_loopback());
    let given = open.filter_map(|(_, given)| given.as_ref()).find(|given| given.value.parse::<IpAddr>().is_ok());
    problems.extend(given.map(|given| {
        given.problem(
            "is not loopback, so anybody who reaches it could use the API: set admin_token_file too, or take an address of 127.0.0.0/8",
        )
    }));
}

/// Takes the admin token: in clear, or as `sha256:` and its digest.
pub(super) fn admin_token(given: &Given<String>, secret: &Secret, problems: &mut Vec<Problem>) -> ApiToken {
    let text = secret.reveal();
    if let Some(digits) = text.strip_prefix(DIGEST_PREFIX) {
        let digest = digest(digits).unwrap_or_else(|| {
            let rule = "must have 64 hexadecimal digits after sha256:, as `printf %s TOKEN | sha256sum` prints them";
            problems.push(given.problem(rule));
            [0; 32]
        });
        return ApiToken::from_digest(digest, Right::Operator);
    }
    if text.len() < ADMIN_TOKEN_BYTES_MIN || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        let rule = format!("must be at least {ADMIN_TOKEN_BYTES_MIN} printable ASCII characters without spaces");
        problems.push(given.problem(rule));
    }
    ApiToken::new(text, Right::Operator)
}

/// Tells whether a setting holds the admin token itself, for whoever reads the file.
pub(super) fn is_in_clear(secret: &Secret) -> bool {
    !secret.reveal().starts_with(DIGEST_PREFIX)
}

/// Resolves the unix socket: `addresses.http = "unix:///run/weft/http.sock"`.
pub(super) fn socket(raw: &RawHttpApi, problems: &mut Vec<Problem>) -> Option<SocketConfig> {
    let Some(given) = &raw.address else {
        if let Some(group) = &raw.group {
            problems.push(group.problem("has no effect without addresses.http = \"unix:///…\""));
        }
        return None;
    };
    let path = PathBuf::from(given.value.strip_prefix("unix://").unwrap_or_default());
    let is_path = path.is_absolute() && path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX && path.file_name().is_some();
    if !is_path || given.value.contains(char::is_whitespace) {
        problems.push(given.problem(format!(
            "must be one IP address, or unix:// and an absolute path of at most {SOCKET_PATH_BYTES_MAX} bytes, or both with a space between them"
        )));
    }
    if let Some(group) = raw.group.as_ref().filter(|group| group.value.is_empty()) {
        problems.push(group.problem("must be the name or number of a group"));
    }
    Some(SocketConfig { path, group: raw.group.as_ref().map(|group| group.value.clone()), key: "addresses.http" })
}

/// Resolves the tokens: each block has `right` and `sha256`, and may have `description`.
pub(super) fn tokens(given: Vec<Given<Value>>, problems: &mut Vec<Problem>) -> Vec<ApiToken> {
    if let Some(last) = given.get(API_TOKENS_MAX) {
        let rule = format!("is one of {}; at most {API_TOKENS_MAX} are allowed", given.len());
        problems.push(Problem::new(last.source.clone(), last.key.clone(), None, rule));
    }
    let mut tokens = Vec::new();
    for block in given {
        let refuse = |key: &str, rule: &str| {
            Problem::new(block.source.clone(), format!("{}.{key}", block.key), None, rule.to_owned())
        };
        let fields = block.value.as_object().cloned().unwrap_or_default();
        let unknown = fields.keys().find(|key| !["right", "sha256", "description"].contains(&key.as_str()));
        if let Some(key) = unknown {
            problems.push(refuse(key, "is not known: a token has right, sha256 and description"));
        }
        let text = |key: &str| fields.get(key).and_then(Value::as_str).unwrap_or_default();
        let right = text("right").parse::<Right>();
        let digest = digest(text("sha256"));
        if right.is_err() {
            problems.push(refuse("right", "must be \"read\", \"services\" or \"operator\""));
        }
        if digest.is_none() {
            problems.push(refuse(
                "sha256",
                "must be the SHA-256 digest of the token, 64 hexadecimal digits: printf %s TOKEN | sha256sum",
            ));
        }
        if let (Ok(right), Some(digest)) = (right, digest) {
            tokens.push(ApiToken::from_digest(digest, right));
        }
    }
    tokens
}

fn digest(text: &str) -> Option<[u8; 32]> {
    if text.len() != DIGEST_DIGITS || !text.is_ascii() {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, digits) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn block(value: Value) -> Given<Value> {
        Given { value, source: Source::Flag("-x"), key: "api_token".to_owned() }
    }

    #[test]
    fn a_token_is_a_right_and_a_digest_and_everything_else_is_named() {
        #[track_caller]
        fn check(value: Value, want: Result<Right, &str>) {
            let (written, mut problems) = (value.to_string(), Vec::new());
            let tokens = tokens(vec![block(value)], &mut problems);
            match want {
                Ok(right) => {
                    assert!(problems.is_empty(), "{problems:?}");
                    assert_eq!(tokens[0].right(), right);
                }
                Err(part) => {
                    let said: Vec<String> = problems.iter().map(ToString::to_string).collect();
                    assert!(said.iter().any(|problem| problem.contains(part)), "{written}: {said:?}");
                }
            }
        }
        let sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        check(json!({"right": "read", "sha256": sha256, "description": "dashboards"}), Ok(Right::Read));
        check(json!({"right": "operator", "sha256": sha256.to_ascii_uppercase()}), Ok(Right::Operator));
        check(json!({"right": "write", "sha256": sha256}), Err("(api_token.right): must be \"read\""));
        check(json!({"sha256": sha256}), Err("api_token.right"));
        check(json!({"right": "read", "sha256": "test"}), Err("sha256sum"));
        check(json!({"right": "read", "sha256": "+".repeat(64)}), Err("sha256sum"));
        check(json!({"right": "read", "sha256": sha256, "token": "test"}), Err("api_token.token"));
        let mut problems = Vec::new();
        let made = tokens(vec![block(json!({"right": "services", "sha256": sha256}))], &mut problems);
        assert_eq!(made, [ApiToken::new("test", Right::Services)], "the digest is that of the token");
        let many = vec![block(json!({"right": "read", "sha256": sha256})); API_TOKENS_MAX + 1];
        tokens(many, &mut problems);
        assert!(problems[0].to_string().contains("at most 64"), "{problems:?}");
    }

    #[test]
    fn a_socket_is_a_path_and_an_address_is_no_socket() {
        let given =
            |key: &str, value: &str| Given { value: value.to_owned(), source: Source::Flag("-x"), key: key.to_owned() };
        let read = |address: Option<&str>, group: Option<&str>| {
            let raw = RawHttpApi {
                address: address.map(|text| given("addresses.http", text)),
                group: group.map(|text| given("unix_sockets.group", text)),
                ..RawHttpApi::default()
            };
            let mut problems = Vec::new();
            let socket = socket(&raw, &mut problems);
            (socket, problems.iter().map(ToString::to_string).collect::<String>())
        };
        let (socket, problems) = read(Some("unix:///run/weft/http.sock"), Some("weft"));
        assert_eq!((socket.unwrap().path, problems.as_str()), (PathBuf::from("/run/weft/http.sock"), ""));
        for bad in ["localhost", "unix://http.sock", "unix:///", &format!("unix:///{}", "x".repeat(107))] {
            assert!(read(Some(bad), None).1.contains("or unix:// and an absolute path"), "{bad}");
        }
        assert!(read(None, Some("weft")).1.contains("has no effect without addresses.http"));
        assert_eq!(read(None, None), (None, String::new()));
    }

    #[test]
    fn https_is_off_until_a_port_is_named() {
        let client = IpAddr::from([127, 0, 0, 1]);
        let port = |value| Some(Given { value, source: Source::Flag("-x"), key: "ports.https".to_owned() });
        let mut problems = Vec::new();
        let https = |raw: RawHttpApi, problems: &mut Vec<Problem>| https(&raw, client, None, problems);
        assert_eq!(https(RawHttpApi::default(), &mut problems), None);
        assert_eq!(https(RawHttpApi { port: port(-1), ..RawHttpApi::default() }, &mut problems), None);
        let own = https(RawHttpApi { port: port(8501), ..RawHttpApi::default() }, &mut problems).unwrap();
        let addr = SocketAddr::new(client, 8501);
        assert_eq!(own, HttpsConfig { addr, certificate: Certificate::Own, client_ca: None });
        assert!(problems.is_empty());
        https(RawHttpApi { port: port(70_000), ..RawHttpApi::default() }, &mut problems);
        let cert =
            Given { value: "/no/such".to_owned(), source: Source::Flag("-x"), key: "tls.https.cert_file".to_owned() };
        https(RawHttpApi { cert_file: Some(cert), ..RawHttpApi::default() }, &mut problems);
        let said: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert!(
            said[0].contains("(ports.https) = 70000: must be a port") && said[1].contains("tls.https.key_file"),
            "{said:?}"
        );
    }
}
