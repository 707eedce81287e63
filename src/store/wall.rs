//! The wall time of the last run: a file of its own beside the database, so that an operator can remove it.

use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use super::{Kind, Store};
use crate::clock::UnixSeconds;

/// The file's name in the data directory: decimal seconds since the Unix epoch, and a line feed.
pub const CLOCK_FILE: &str = "clock";
/// More than the digits of any time.
const CLOCK_BYTES_MAX: u64 = 32;

impl Store {
    /// Returns where the wall time is kept; nowhere in memory.
    pub fn clock_file(&self) -> Option<PathBuf> {
        (self.inner.kind == Kind::File).then(|| self.inner.path.with_file_name(CLOCK_FILE))
    }

    /// Returns the wall time that was kept last; none if there is none, or what is there is no time.
    pub fn kept_wall(&self) -> Option<UnixSeconds> {
        use io::Read as _;
        let mut text = String::new();
        let file = std::fs::File::open(self.clock_file()?).ok()?;
        file.take(CLOCK_BYTES_MAX).read_to_string(&mut text).ok()?;
        text.trim_end().parse().ok().map(UnixSeconds)
    }

    /// Keeps `now` for the next start, without an fsync: a crash of the host may lose it, and costs no more than that.
    ///
    /// # Errors
    /// The system's; what was kept before stands.
    pub fn keep_wall(&self, now: UnixSeconds) -> io::Result<()> {
        use io::Write as _;
        let Some(path) = self.clock_file() else { return Ok(()) };
        let aside = path.with_extension("new");
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        writeln!(file, "{}", now.0)?;
        std::fs::rename(aside, path)
    }
}
