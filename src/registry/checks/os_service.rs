//! The check of a systemd unit, over D-Bus' system bus.
//!
//! ```text
//!   connect -> AUTH EXTERNAL -> Hello -> Manager.LoadUnit(unit) -> Properties.Get(LoadState, ActiveState, SubState)
//! ```
//!
//! As much of the D-Bus Specification (0.43: authentication, message format) as four method calls need: a full client
//! weighs more than the rest of the checks.
//! Invariants: a message of the bus is at most [`MESSAGE_BYTES_MAX`]; everything in it is read with its bounds checked.

use std::fmt::Write as _;
use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::net::{critical, passing};
use super::state::Outcome;
use crate::model::HealthStatus;

/// Largest message that is taken, in bytes: answers here are texts.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Messages that are not the answer (signals) before it is given up.
const OTHER_MESSAGES_MAX: usize = 64;
/// Bytes of a message before its header fields.
const FIXED_BYTES: usize = 16;

const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
/// Header fields (D-Bus Specification, "Header Fields").
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

const SYSTEMD: &str = "org.freedesktop.systemd1";

/// Runs the check once; the caller bounds the time.
pub(super) async fn run(socket: &Path, unit: &str) -> Outcome {
    match ask(socket, unit).await {
        Ok(state) => judge(unit, &state),
        Err(problem) => critical(format!("OS service {unit}: {problem}")),
    }
}

/// What systemd says of a unit.
struct UnitState {
    load: String,
    active: String,
    sub: String,
}

fn judge(unit: &str, state: &UnitState) -> Outcome {
    let UnitState { load, active, sub } = state;
    if load != "loaded" {
        return critical(format!("OS service {unit}: systemd has no such unit ({load})"));
    }
    let output = format!("OS service {unit}: {active} ({sub})");
    match active.as_str() {
        "active" | "reloading" | "refreshing" => passing(output),
        "activating" | "deactivating" | "maintenance" => Outcome { status: HealthStatus::Warning, output },
        _ => critical(output),
    }
}

async fn ask(socket: &Path, unit: &str) -> Result<UnitState, String> {
    let mut bus = Bus::open(socket).await?;
    let manager = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");
    let path = bus.call(SYSTEMD, manager, "LoadUnit", &[unit]).await?;
    let mut states = Vec::new();
    for property in ["LoadState", "ActiveState", "SubState"] {
        let of_unit = (path.as_str(), "org.freedesktop.DBus.Properties");
        states.push(bus.call(SYSTEMD, of_unit, "Get", &["org.freedesktop.systemd1.Unit", property]).await?);
    }
    let [load, active, sub] = <[String; 3]>::try_from(states).map_err(|_| "no state".to_owned())?;
    Ok(UnitState { load, active, sub })
}

/// A connection to the bus.
struct Bus {
    stream: UnixStream,
    serial: u32,
}

impl Bus {
    async fn open(socket: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(socket).await;
        let mut stream = stream.map_err(|error| format!("cannot connect to {}: {error}", socket.display()))?;
        let user = nix::unistd::geteuid().to_string();
        let mut hello = "\0AUTH EXTERNAL ".to_owned();
        for digit in user.bytes() {
            // Writing to a String cannot fail.
            let _written = write!(hello, "{digit:02x}");
        }
        hello.push_str("\r\n");
        stream.write_all(hello.as_bytes()).await.map_err(|error| error.to_string())?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            if line.len() > 256 {
                return Err("the bus answers the authentication with no line".to_owned());
            }
            line.push(stream.read_u8().await.map_err(|error| format!("the bus closed the connection: {error}"))?);
        }
        if !line.starts_with(b"OK ") {
            return Err(format!("the bus refuses this user: {}", String::from_utf8_lossy(&line).trim_end()));
        }
        stream.write_all(b"BEGIN\r\n").await.map_err(|error| error.to_string())?;
        let mut bus = Self { stream, serial: 0 };
        let daemon = ("/org/freedesktop/DBus", "org.freedesktop.DBus");
        bus.call("org.freedesktop.DBus", daemon, "Hello", &[]).await?;
        Ok(bus)
    }

    /// Calls a method with texts; returns the text, path or variant of either that it gives.
    async fn call(
        &mut self,
        destination: &str,
        (path, interface): (&str, &str),
        member: &str,
        texts: &[&str],
    ) -> Result<String, String> {
        self.serial += 1;
        let fields =
            [(PATH, 'o', path), (INTERFACE, 's', interface), (MEMBER, 's', member), (DESTINATION, 's', destination)];
        let message = encode_call(self.serial, &fields, texts);
        self.stream.write_all(&message).await.map_err(|error| error.to_string())?;
        for _ in 0..OTHER_MESSAGES_MAX {
            let message = self.receive().await?;
            if message.reply_serial != Some(self.serial) {
                continue;
            }
            return match message.kind {
                METHOD_RETURN => message.text().ok_or_else(|| format!("the bus answers {member} with no text")),
                ERROR => {
                    let text = message.text().unwrap_or_default();
                    Err(format!("{member}: {text} ({})", message.error_name.unwrap_or_default()))
                }
                _ => continue,
            };
        }
        Err(format!("the bus does not answer {member}"))
    }

    async fn receive(&mut self) -> Result<Message, String> {
        let mut fixed = [0; FIXED_BYTES];
        let broken = |error: std::io::Error| format!("the bus closed the connection: {error}");
        self.stream.read_exact(&mut fixed).await.map_err(broken)?;
        let malformed = || "the bus sent a malformed message".to_owned();
        let sizes = Reader { bytes: &fixed, at: 4, is_big: fixed.first() == Some(&b'B') };
        let (body, fields) = sizes.sizes().ok_or_else(malformed)?;
        let rest = fields.next_multiple_of(8).checked_add(body).filter(|bytes| *bytes <= MESSAGE_BYTES_MAX);
        let mut bytes = fixed.to_vec();
        bytes.resize(FIXED_BYTES + rest.ok_or_else(malformed)?, 0);
        self.stream.read_exact(bytes.get_mut(FIXED_BYTES..).unwrap_or_default()).await.map_err(broken)?;
        decode(bytes).ok_or_else(malformed)
    }
}

/// A message of the bus.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    kind: u8,
    reply_serial: Option<u32>,
    error_name: Option<String>,
    signature: String,
    body: Vec<u8>,
    is_big: bool,
}

impl Message {
    /// The body's first value, if it is a text, an object's path, or a variant of one.
    fn text(&self) -> Option<String> {
        let mut reader = Reader { bytes: &self.body, at: 0, is_big: self.is_big };
        match self.signature.chars().next() {
            Some('s' | 'o') => reader.text(),
            Some('v') => match reader.signature()?.as_str() {
                "s" | "o" => reader.text(),
                _ => None,
            },
            // A method that gives nothing.
            None => Some(String::new()),
            Some(_) => None,
        }
    }
}

/// Writes a method call, little-endian.
fn encode_call(serial: u32, fields: &[(u8, char, &str)], texts: &[&str]) -> Vec<u8> {
    let mut body = Vec::new();
    for text in texts {
        put_text(&mut body, text);
    }
    let mut header = Vec::new();
    for (code, kind, value) in fields {
        pad(&mut header, 8);
        header.extend([*code, 1, u8::try_from(*kind).unwrap_or(b's'), 0]);
        put_text(&mut header, value);
    }
    if !texts.is_empty() {
        pad(&mut header, 8);
        header.extend([SIGNATURE, 1, b'g', 0, u8::try_from(texts.len()).unwrap_or(u8::MAX)]);
        header.extend(texts.iter().map(|_| b's'));
        header.push(0);
    }
    let mut message = vec![b'l', METHOD_CALL, 0, 1];
    message.extend(u32_of(body.len()));
    message.extend(serial.to_le_bytes());
    message.extend(u32_of(header.len()));
    message.extend(header);
    pad(&mut message, 8);
    message.extend(body);
    message
}

fn u32_of(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes()
}

fn pad(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    pad(bytes, 4);
    bytes.extend(u32_of(text.len()));
    bytes.extend(text.as_bytes());
    bytes.push(0);
}

/// Reads a whole message; none if it is malformed.
pub(super) fn decode(mut bytes: Vec<u8>) -> Option<Message> {
    let is_big = match bytes.first()? {
        b'l' => false,
        b'B' => true,
        _ => return None,
    };
    let kind = *bytes.get(1)?;
    let reader = |at| Reader { bytes: &bytes, at, is_big };
    let (body_bytes, field_bytes) = reader(4).sizes()?;
    let fields_end = FIXED_BYTES.checked_add(field_bytes)?;
    let mut fields = Reader { bytes: bytes.get(..fields_end)?, at: FIXED_BYTES, is_big };
    let (mut reply_serial, mut error_name, mut signature) = (None, None, String::new());
    while fields.at < fields_end {
        fields.align(8);
        let code = fields.byte()?;
        match fields.signature()?.as_str() {
            "u" => {
                let number = fields.number()?;
                if code == REPLY_SERIAL {
                    reply_serial = Some(number);
                }
            }
            "s" | "o" => {
                let text = fields.text()?;
                if code == ERROR_NAME {
                    error_name = Some(text);
                }
            }
            "g" => {
                let text = fields.signature()?;
                if code == SIGNATURE {
                    signature = text;
                }
            }
            _ => return None,
        }
    }
    let body_at = fields_end.next_multiple_of(8);
    if bytes.len() != body_at.checked_add(body_bytes)? {
        return None;
    }
    let body = bytes.split_off(body_at);
    Some(Message { kind, reply_serial, error_name, signature, body, is_big })
}

/// Reads values one after the other.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    is_big: bool,
}

impl Reader<'_> {
    /// The lengths of body and header fields, from the fixed part.
    fn sizes(mut self) -> Option<(usize, usize)> {
        let body = self.number()?;
        let _serial = self.number()?;
        let fields = self.number()?;
        Some((usize::try_from(body).ok()?, usize::try_from(fields).ok()?))
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> Option<&[u8]> {
        let end = self.at.checked_add(length)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn number(&mut self) -> Option<u32> {
        self.align(4);
        let is_big = self.is_big;
        let bytes = self.take(4)?.try_into().ok()?;
        Some(if is_big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }

    fn text(&mut self) -> Option<String> {
        let length = usize::try_from(self.number()?).ok()?;
        let text = String::from_utf8(self.take(length)?.to_vec()).ok()?;
        self.take(1)?;
        Some(text)
    }

    fn signature(&mut self) -> Option<String> {
        let length = usize::from(self.byte()?);
        let text = String::from_utf8(self.take(length)?.to_vec()).ok()?;
        self.take(1)?;
        Some(text)
    }
}
