//! Why the store fails, with what to do about it.

use std::path::PathBuf;

use crate::wire::WireError;

/// Why the store failed; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The data directory cannot be made or entered.
    #[error("cannot use data directory {}: make it a directory that this user may write to, or name another one with -data-dir", dir.display())]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file cannot be made, read or written.
    #[error("cannot open {}: this user must be able to read and write it", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Another agent has it.
    #[error("{} is in use by another agent: stop that one, or give this one a data directory of its own with -data-dir", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file does not hold what was written to it.
    #[error("{} is corrupt ({reason}): restore it from a backup, or move it away and start again with a token; it was left as it is", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// The file was written in a format that this build does not read.
    #[error("{} has file format {found}, which this weft does not read: start the weft that wrote it, or move the file away and start again with a token", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format's number.
        found: u8,
    },
    /// A read or a commit failed.
    #[error("cannot read or write {}: check the disk for free space and errors; the next call tries again", path.display())]
    Transaction {
        /// The file.
        path: PathBuf,
        /// What the database said.
        #[source]
        source: Box<redb::Error>,
    },
    /// A value is in the file that this build cannot read.
    #[error("{}: the value {key:?} in `{table}` is not readable by this weft: start the weft that wrote it, or move the file away and start again with a token", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Where it stands.
        table: &'static str,
        /// Its key.
        key: String,
        /// Why.
        #[source]
        source: WireError,
    },
    /// A value is too large to be kept.
    #[error("value {key:?} does not fit into the store")]
    Encode {
        /// Its key.
        key: String,
        /// Why.
        #[source]
        source: WireError,
    },
}
