//! The script check: a program of this host, without a shell.
//!
//! ```text
//!   spawn (own process group, cleared environment) -> read output, at most so much -> exit code
//!     timeout, or the check is dropped -> SIGKILL to the group
//! ```
//!
//! Invariants: a program is started with `/` as its directory, with no input, and with the environment of [`environment`]
//! alone, so that no secret of the agent's is in it; what it leaves behind in its process group ends with it.
//! Not here: whether programs may be run at all (`task`), how many at once (`schedule`).

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use super::net::critical;
use super::state::Outcome;
use crate::model::HealthStatus;
use crate::registry::definition::CheckDefinition;

/// Where programs without a path are looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Reads that empty a pipe (64 KiB).
const PIPE_READS_MAX: usize = 16;

/// A process group that is killed when this is dropped.
struct Group(Pid);

impl Drop for Group {
    fn drop(&mut self) {
        // A group whose members have all ended is gone; its number is not given out again while one lives.
        let _gone = killpg(self.0, Signal::SIGKILL);
    }
}

/// All that a program finds in its environment.
fn environment(definition: &CheckDefinition) -> Vec<(&'static str, String)> {
    let service = definition.service.as_ref().map(ToString::to_string).unwrap_or_default();
    vec![
        ("PATH", PATH.to_owned()),
        ("LANG", "C.UTF-8".to_owned()),
        ("WEFT_CHECK_ID", definition.id.to_string()),
        ("WEFT_SERVICE_ID", service),
    ]
}

/// Judges an exit code as Consul does.
pub(super) fn judge(code: Option<i64>) -> HealthStatus {
    match code {
        Some(0) => HealthStatus::Passing,
        Some(1) => HealthStatus::Warning,
        _ => HealthStatus::Critical,
    }
}

/// Runs the program once, for at most `limit`.
///
/// # Cancel safety
/// Cancelling kills the program's process group.
pub(super) async fn run(definition: &CheckDefinition, args: &[String], limit: Duration) -> Outcome {
    let (mut child, group, output) = match start(definition, args) {
        Ok(started) => started,
        Err(error) => return critical(format!("cannot start {:?}: {error}", args.first().map_or("", String::as_str))),
    };
    let mut kept = Vec::new();
    let ended = tokio::time::timeout(limit, finish(&mut child, output, definition.output_bytes_max, &mut kept)).await;
    drop(group);
    let text = String::from_utf8_lossy(&kept).into_owned();
    match ended {
        Ok(Ok(status)) => Outcome { status: judge(status.code().map(i64::from)), output: describe(status, text) },
        Ok(Err(error)) => critical(format!("cannot wait for the program: {error}")),
        Err(_) => critical(format!("killed after the timeout of {limit:?}; its output until then: {text}")),
    }
}

fn describe(status: ExitStatus, text: String) -> String {
    if status.code().is_some() { text } else { format!("{status}; its output: {text}") }
}

fn start(definition: &CheckDefinition, args: &[String]) -> io::Result<(Child, Group, pipe::Receiver)> {
    let (program, rest) = args.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let (reader, writer) = io::pipe()?;
    let output = pipe::Receiver::from_owned_fd(reader.into())?;
    let mut command = Command::new(program);
    command.args(rest).env_clear().envs(environment(definition)).current_dir("/");
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).process_group(0).kill_on_drop(true);
    let child = command.spawn()?;
    // The command holds the pipe's writing ends: the reader would never see their end.
    drop(command);
    let id = child.id().and_then(|id| i32::try_from(id).ok()).ok_or(io::ErrorKind::NotFound)?;
    Ok((child, Group(Pid::from_raw(id)), output))
}

/// Reads the output to its end or to the program's, keeping `bytes_max` of it, and waits for the program.
async fn finish(
    child: &mut Child,
    mut output: pipe::Receiver,
    bytes_max: usize,
    kept: &mut Vec<u8>,
) -> io::Result<ExitStatus> {
    let mut buffer = [0; 4096];
    let mut keep = |buffer: &[u8], read: usize| {
        // What is beyond is read and dropped, or the program would wait for a reader.
        let room = bytes_max.saturating_sub(kept.len()).min(read);
        kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
    };
    loop {
        tokio::select! {
            read = output.read(&mut buffer) => match read? {
                0 => return child.wait().await,
                read => keep(&buffer, read),
            },
            // Something that it left behind may hold the pipe for ever: only what is in it is read.
            ended = child.wait() => {
                for _ in 0..PIPE_READS_MAX {
                    match output.try_read(&mut buffer) {
                        Ok(0) | Err(_) => break,
                        Ok(read) => keep(&buffer, read),
                    }
                }
                return ended;
            }
        }
    }
}
