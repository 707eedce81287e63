//! Logs: one subscriber, to standard error, as text or JSON.
//!
//! ```text
//!   tracing events -> Filter (level, or per-module directives) -> text | JSON -> stderr
//!                 \-> weft's own, at the level of the chattiest monitor -> text, JSON -> monitors (none: nothing is written)
//! ```
//!
//! Invariants: standard output stays free for what a verb prints; colours appear on a terminal only.
//! Not here: metrics (`metrics`), what is worth logging (each module).

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::str::FromStr;
use std::sync::{Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::broadcast;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer as _, reload};

/// The level where none is set: changes that users can see.
pub const FILTER_DEFAULT: &str = "info";

/// Levels that a filter of one word may name.
const LEVELS: [&str; 6] = ["trace", "debug", "info", "warn", "error", "off"];

/// Which events are logged: a level, or directives by module (`info,weft::gossip=debug`). Valid once parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter(String);

/// Why a text is no filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no log level: use trace, debug, info, warn, error or off, or module=level pairs joined by commas")]
pub struct FilterError {
    /// The text.
    pub text: String,
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let refuse = || FilterError { text: text.to_owned() };
        if text.trim().is_empty() {
            return Err(refuse());
        }
        for directive in text.split(',').map(str::trim) {
            // A directive without `=` would otherwise pass as the name of a module: a misspelt level must not.
            let level = directive.rsplit_once('=').map_or(directive, |(_, level)| level).trim();
            if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
                return Err(refuse());
            }
        }
        let lower = text.trim().to_ascii_lowercase();
        EnvFilter::try_new(&lower).map_err(|_| refuse())?;
        Ok(Self(lower))
    }
}

impl Default for Filter {
    fn default() -> Self {
        Self(FILTER_DEFAULT.to_owned())
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot start logging: this process logs already")]
pub struct InitError(#[source] TryInitError);

/// Starts logging for the whole process. Call once, before the first event.
///
/// # Errors
/// If the process has a subscriber already.
pub fn init(filter: &Filter, format: LogFormat) -> Result<(), InitError> {
    let lines =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let (for_log, log) = reload::Layer::new(EnvFilter::new(&filter.0));
    let (for_text, text) = reload::Layer::new(Targets::new());
    let (for_json, json) = reload::Layer::new(Targets::new());
    let text_monitor = tracing_subscriber::fmt::layer().with_writer(Broadcast(LogFormat::Text)).with_ansi(false);
    let json_monitor = tracing_subscriber::fmt::layer().json().with_writer(Broadcast(LogFormat::Json));
    let monitored = tracing_subscriber::registry()
        .with(text_monitor.with_filter(for_text))
        .with(json_monitor.with_filter(for_json));
    let begun = match format {
        LogFormat::Text => monitored.with(lines.with_filter(for_log)).try_init(),
        LogFormat::Json => monitored.with(lines.json().with_filter(for_log)).try_init(),
    };
    begun.map_err(InitError)?;
    // There is one subscriber, so these are the first values.
    let _first = SWAP.set(Box::new(move |filter| log.reload(filter).is_ok()));
    let of =
        |set: Retarget| Monitors { lines: broadcast::Sender::new(MONITOR_LINES_MAX), levels: Mutex::default(), set };
    let _first = MONITORS.set([
        of(Box::new(move |targets| text.reload(targets).is_ok())),
        of(Box::new(move |targets| json.reload(targets).is_ok())),
    ]);
    Ok(())
}

type Swap = Box<dyn Fn(EnvFilter) -> bool + Send + Sync>;

/// Changes the filter of the process's one subscriber.
static SWAP: OnceLock<Swap> = OnceLock::new();

/// Logs by `filter` from here on; false where logging was not started by [`init`].
pub fn set_filter(filter: &Filter) -> bool {
    SWAP.get().is_some_and(|swap| swap(EnvFilter::new(&filter.0)))
}

/// Lines that wait for a monitor that reads slowly; what is older is lost, and counted in its stead. 512 lines are some 100 KiB.
const MONITOR_LINES_MAX: usize = 512;
/// Most monitors at once of either format: people, not collectors.
const MONITORS_MAX: usize = 16;

type Retarget = Box<dyn Fn(Targets) -> bool + Send + Sync>;

/// Who reads the log besides standard error, in one format.
struct Monitors {
    lines: broadcast::Sender<(Level, Bytes)>,
    /// How many there are of each level.
    levels: Mutex<BTreeMap<Level, usize>>,
    set: Retarget,
}

/// Of text, and of JSON.
static MONITORS: OnceLock<[Monitors; 2]> = OnceLock::new();

fn monitors(format: LogFormat) -> Option<&'static Monitors> {
    let [text, json] = MONITORS.get()?;
    Some(match format {
        LogFormat::Text => text,
        LogFormat::Json => json,
    })
}

impl Monitors {
    /// Lets through what the chattiest monitor wants: weft's own events alone, since those of the libraries that carry the
    /// lines to the monitor would beget more lines.
    fn apply(&self, levels: &BTreeMap<Level, usize>) {
        let chattiest = levels.keys().next_back();
        let targets = chattiest.map_or_else(Targets::new, |level| Targets::new().with_target("weft", *level));
        (self.set)(targets);
    }
}

/// Why there is no monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MonitorError {
    /// Others took all places.
    #[error("{MONITORS_MAX} monitors read the log already: end one of them")]
    TooMany,
    /// The process has another subscriber.
    #[error("the log cannot be monitored: this process does not log by itself")]
    NotLogging,
}

/// Reads the log as it is written. Ends its part of it when it is dropped.
pub struct Monitor {
    of: &'static Monitors,
    level: Level,
    lines: broadcast::Receiver<(Level, Bytes)>,
}

/// Reads a level by its name, in any case; none of `off` and others.
pub fn level(name: &str) -> Option<Level> {
    match name.to_ascii_lowercase().as_str() {
        "warn" | "warning" => Some(Level::WARN),
        // Consul's names.
        "err" => Some(Level::ERROR),
        name if name.chars().all(|c| c.is_ascii_alphabetic()) => name.parse().ok(),
        _ => None,
    }
}

/// Starts to read what weft logs at `level` and above in `format`, whatever the log's own filter and format are.
///
/// # Errors
/// [`MonitorError`].
pub fn monitor(level: Level, format: LogFormat) -> Result<Monitor, MonitorError> {
    let of = monitors(format).ok_or(MonitorError::NotLogging)?;
    let mut levels = of.levels.lock().unwrap_or_else(PoisonError::into_inner);
    if levels.values().sum::<usize>() >= MONITORS_MAX {
        return Err(MonitorError::TooMany);
    }
    *levels.entry(level).or_default() += 1;
    of.apply(&levels);
    drop(levels);
    Ok(Monitor { of, level, lines: of.lines.subscribe() })
}

impl Monitor {
    /// Returns the next line, with its end; none when the process logs no more.
    ///
    /// # Cancel safety
    /// Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            match self.lines.recv().await {
                Ok((level, line)) if level <= self.level => return Some(line),
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(lost)) => {
                    return Some(Bytes::from(format!(
                        "{lost} lines were lost: they came faster than they were read\n"
                    )));
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let mut levels = self.of.levels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = levels.get_mut(&self.level) {
            *count -= 1;
            if *count == 0 {
                levels.remove(&self.level);
            }
        }
        self.of.apply(&levels);
    }
}

/// Gives each line to the monitors of its format.
struct Broadcast(LogFormat);

/// One line; the layer writes it in one piece.
struct Line(LogFormat, Level);

impl<'a> MakeWriter<'a> for Broadcast {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self.0, Level::ERROR)
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Line {
        Line(self.0, *event.level())
    }
}

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        if let Some(monitors) = monitors(self.0) {
            // Without a monitor nobody takes it.
            let _taken = monitors.lines.send((self.1, Bytes::copy_from_slice(line)));
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Prints an error with its sources, joined by `: `. For log fields: `error = %Chain(&err)`.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_a_level_or_levels_by_module() {
        for text in ["info", "DEBUG", "warn,weft::gossip=trace", "weft::proxy=off", " info "] {
            assert!(text.parse::<Filter>().is_ok(), "{text}");
        }
        assert_eq!("WARN".parse::<Filter>().unwrap().to_string(), "warn");
    }

    #[test]
    fn a_misspelt_level_is_refused_and_the_known_ones_are_named() {
        for text in ["", "verbose", "weft=loud", "info,", "info,chatty", "=,="] {
            let refused = text.parse::<Filter>().unwrap_err().to_string();
            assert!(refused.contains("use trace, debug, info, warn"), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_monitor_hears_its_level_whatever_the_log_lets_through() {
        // The process's one subscriber: no other unit test starts it.
        init(&"off".parse().unwrap(), LogFormat::Text).unwrap();
        tracing::warn!("nobody listens");
        let mut all = monitor(Level::DEBUG, LogFormat::Text).unwrap();
        let mut some = monitor(level("WARN").unwrap(), LogFormat::Text).unwrap();
        let mut json = monitor(Level::INFO, LogFormat::Json).unwrap();
        tracing::debug!(peer = "n2", "a detail");
        tracing::warn!("a warning");
        tracing::warn!(target: "hyper", "not weft's");
        let text = |line: Bytes| String::from_utf8(line.to_vec()).unwrap();
        let first = text(all.next().await.unwrap());
        assert!(first.contains("a detail") && first.contains("n2") && first.ends_with('\n'), "{first}");
        assert!(text(all.next().await.unwrap()).contains("a warning"));
        assert!(text(some.next().await.unwrap()).contains("a warning"));
        let line: serde_json::Value = serde_json::from_str(&text(json.next().await.unwrap())).unwrap();
        assert_eq!((&line["level"], &line["fields"]["message"]), (&"WARN".into(), &"a warning".into()));
        drop((all, some, json));
        assert!(!tracing::enabled!(Level::ERROR), "without a monitor nothing is formatted");
        let _places: Vec<Monitor> =
            (0..MONITORS_MAX).map(|_| monitor(Level::ERROR, LogFormat::Text).unwrap()).collect();
        assert!(matches!(monitor(Level::INFO, LogFormat::Text), Err(MonitorError::TooMany)));
    }

    #[test]
    fn levels_have_consul_s_names_too() {
        assert_eq!(
            (level("Info"), level("err"), level("warning")),
            (Some(Level::INFO), Some(Level::ERROR), Some(Level::WARN))
        );
        assert_eq!((level("off"), level("7"), level("")), (None, None, None));
    }

    #[test]
    fn a_chain_names_every_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open the door")]
        struct Door(#[source] std::io::Error);

        let err = Door(std::io::Error::other("the key is lost"));
        assert_eq!(Chain(&err).to_string(), "cannot open the door: the key is lost");
    }
}
