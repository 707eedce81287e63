//! The verbs about the command line itself: `completion`, `man`.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::shells;

use crate::cli::{Cli, Shell};
use crate::failure::Failure;

/// `weft completion`
pub(crate) fn completion(shell: Shell) {
    // By way of a buffer: the generator panics where nothing can be written.
    let (mut command, mut out) = (Cli::command(), Vec::new());
    match shell {
        Shell::Bash => clap_complete::generate(shells::Bash, &mut command, "weft", &mut out),
        Shell::Zsh => clap_complete::generate(shells::Zsh, &mut command, "weft", &mut out),
        Shell::Fish => clap_complete::generate(shells::Fish, &mut command, "weft", &mut out),
    }
    print!("{}", String::from_utf8_lossy(&out));
}

/// `weft man`
pub(crate) fn man(dir: &Path) -> Result<(), Failure> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir).with_context(|| format!("cannot write into {}", dir.display()))?;
    println!("Wrote the manual pages into {}.", dir.display());
    Ok(())
}
