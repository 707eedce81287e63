//! Logs: one subscriber, to standard error, as text or JSON.
//!
//! ```text
//!   tracing events -> Filter (level, or per-module directives) -> text | JSON -> stderr
//! ```
//!
//! Invariants: standard output stays free for what a verb prints; colours appear on a terminal only.
//! Not here: metrics (`metrics`), what is worth logging (each module).

use std::error::Error;
use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

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
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&filter.0))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let (swap, begun): (Swap, _) = match format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            (Box::new(move |filter| handle.reload(filter).is_ok()), builder.finish().try_init())
        }
        LogFormat::Json => {
            let builder = builder.json().with_filter_reloading();
            let handle = builder.reload_handle();
            (Box::new(move |filter| handle.reload(filter).is_ok()), builder.finish().try_init())
        }
    };
    begun.map_err(InitError)?;
    // There is one subscriber, so this is the first value.
    let _first = SWAP.set(swap);
    Ok(())
}

type Swap = Box<dyn Fn(EnvFilter) -> bool + Send + Sync>;

/// Changes the filter of the process's one subscriber.
static SWAP: OnceLock<Swap> = OnceLock::new();

/// Logs by `filter` from here on; false where logging was not started by [`init`].
pub fn set_filter(filter: &Filter) -> bool {
    SWAP.get().is_some_and(|swap| swap(EnvFilter::new(&filter.0)))
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

    #[test]
    fn a_chain_names_every_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open the door")]
        struct Door(#[source] std::io::Error);

        let err = Door(std::io::Error::other("the key is lost"));
        assert_eq!(Chain(&err).to_string(), "cannot open the door: the key is lost");
    }
}
