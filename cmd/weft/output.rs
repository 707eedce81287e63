//! What verbs print. `print!`, `println!` and `eprintln!` of this binary are the macros of this file: std's panic where nobody
//! reads any more (`weft catalog services | head -1`), and the verb's exit code is lost with them.
//!
//! A reader that goes away ends nothing but the printing: what a verb does it does to its end, and its exit code is its own.
//! A verb that prints for ever ends then ([`has_no_reader`]). What cannot be written for another reason fails the verb.

use std::fmt;
use std::io::{self, ErrorKind, Write as _};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};

/// The reader of standard output has gone.
static NO_READER: AtomicBool = AtomicBool::new(false);

macro_rules! print {
    ($($text:tt)*) => { $crate::output::write(format_args!($($text)*)) };
}

macro_rules! println {
    ($($text:tt)*) => { $crate::output::write(format_args!("{}\n", format_args!($($text)*))) };
}

macro_rules! eprintln {
    ($($text:tt)*) => { $crate::output::tell(format_args!("{}\n", format_args!($($text)*))) };
}

/// Writes to standard output; where that fails, but for want of a reader, the verb ends with code 1.
pub(crate) fn write(text: fmt::Arguments<'_>) {
    let Err(error) = pass_on(text.to_string().as_bytes()) else { return };
    if error.kind() != ErrorKind::BrokenPipe {
        tell(format_args!("error: cannot write to standard output: {error}\n"));
        process::exit(1)
    }
}

/// Writes bytes to standard output at once.
///
/// # Errors
/// Those of the system; [`ErrorKind::BrokenPipe`] once nobody reads.
pub(crate) fn pass_on(bytes: &[u8]) -> io::Result<()> {
    if has_no_reader() {
        return Err(ErrorKind::BrokenPipe.into());
    }
    let mut out = io::stdout().lock();
    let written = out.write_all(bytes).and_then(|()| out.flush());
    if written.as_ref().is_err_and(|error| error.kind() == ErrorKind::BrokenPipe) {
        NO_READER.store(true, Ordering::Relaxed);
    }
    written
}

/// Tells whether the reader of standard output has gone.
pub(crate) fn has_no_reader() -> bool {
    NO_READER.load(Ordering::Relaxed)
}

/// Writes to standard error, if anybody reads it.
pub(crate) fn tell(text: fmt::Arguments<'_>) {
    // There is no third place to say that nobody reads this one.
    let _unread = io::stderr().lock().write_fmt(text);
}
