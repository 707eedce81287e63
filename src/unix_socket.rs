//! A unix socket's file: made with its mode from the first moment on, and removed only where it is safe.
//!
//! The mode is set on the socket before it gets its name: Linux makes the file with it, so there is no moment at which
//! others could connect. A file that is there already is removed if it is a socket of the agent's own user that nobody
//! serves; a link, a file, another user's socket and a living server are left alone and named.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// The agent's user alone.
const MODE_ALONE: u32 = 0o600;
/// The group's members too.
const MODE_GROUP: u32 = 0o660;

/// Longest path of a unix socket, in bytes: `sun_path` has 108 with the closing zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Where a socket is, and who may connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketConfig {
    /// The path: absolute, at most [`SOCKET_PATH_BYTES_MAX`] bytes.
    pub path: PathBuf,
    /// A group of this host whose members may connect; none: the agent's user and root alone.
    pub group: Option<String>,
    /// The configuration key of the path, which errors name.
    pub key: &'static str,
}

/// Why a socket is not opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path is in use.
    #[error("another process serves {}: give each agent a {key} of its own", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
        /// Where it is configured.
        key: &'static str,
    },
    /// Something stands in the way that is not removed.
    #[error("{} is {what}; nothing was removed: choose another {key}, or move it away", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: &'static str,
        /// Where it is configured.
        key: &'static str,
    },
    /// There is no such group.
    #[error("this host has no group `{name}`, which may connect to {key}: correct its name, or make the group")]
    Group {
        /// Its name.
        name: String,
        /// Where the socket is configured.
        key: &'static str,
    },
    /// The operating system refuses.
    #[error("cannot {action} the socket {}; its directory must exist and be the agent's to write", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A bound socket; its file is removed when this is dropped, if it is still the one that was made.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl Listening {
    /// Accepts connections.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.file) {
            // What stays is taken over by the next start.
            let _unused = fs::remove_file(&self.path);
        }
    }
}

/// Opens the socket of `config`, inside a tokio runtime.
///
/// # Errors
/// [`SocketError`]; what stood there is left alone.
pub fn bind(config: &SocketConfig) -> Result<Listening, SocketError> {
    let path = &config.path;
    let failed = |action| move |source| SocketError::Io { action, path: path.clone(), source };
    let group = config.group.as_deref().map(|name| group_id(name, config.key)).transpose()?;
    make_way(path, config.key)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed("make"))?;
    let socket = with_mode(socket, MODE_ALONE).map_err(failed("make"))?;
    socket.bind(&SockAddr::unix(path).map_err(failed("name"))?).map_err(failed("bind"))?;
    let made = fs::symlink_metadata(path).map_err(failed("look at"))?;
    if let Some(group) = group {
        chown(path, None, Some(group)).map_err(failed("give the group"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(MODE_GROUP)).map_err(failed("open to the group"))?;
    }
    socket.listen(BACKLOG).map_err(failed("listen on"))?;
    socket.set_nonblocking(true).map_err(failed("listen on"))?;
    let listener = UnixListener::from_std(StdUnixListener::from(OwnedFd::from(socket))).map_err(failed("listen on"))?;
    Ok(Listening { listener, path: path.clone(), file: (made.dev(), made.ino()) })
}

/// Sets the mode that the socket's file will have.
fn with_mode(socket: Socket, mode: u32) -> io::Result<Socket> {
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(Socket::from(OwnedFd::from(file)))
}

fn group_id(name: &str, key: &'static str) -> Result<u32, SocketError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let found = nix::unistd::Group::from_name(name).ok().flatten();
    found.map(|group| group.gid.as_raw()).ok_or_else(|| SocketError::Group { name: name.to_owned(), key })
}

/// Removes the socket that an earlier run left.
fn make_way(path: &Path, key: &'static str) -> Result<(), SocketError> {
    let failed = |action| move |source| SocketError::Io { action, path: path.to_owned(), source };
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(failed("look at"))?,
    };
    let occupied = |what| Err(SocketError::Occupied { path: path.to_owned(), what, key });
    if !found.file_type().is_socket() {
        return occupied("no socket");
    }
    if found.uid() != nix::unistd::geteuid().as_raw() {
        return occupied("another user's socket");
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed("make"))?;
    probe.set_nonblocking(true).map_err(failed("make"))?;
    match probe.connect(&SockAddr::unix(path).map_err(failed("name"))?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // It listens, or its queue is full: somebody is there.
        Ok(()) | Err(_) => Err(SocketError::InUse { path: path.to_owned(), key }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: PathBuf) -> SocketConfig {
        SocketConfig { path, group: None, key: "x.socket" }
    }

    #[tokio::test]
    async fn the_file_is_the_owner_s_alone_or_the_group_s_too_and_goes_with_the_listener() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("w.sock");
        let mode = || fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777;
        let listening = bind(&at(path.clone())).unwrap();
        assert_eq!(mode(), 0o600);
        drop(listening);
        assert!(!path.exists());
        let gid = nix::unistd::getegid().as_raw().to_string();
        let listening = bind(&SocketConfig { group: Some(gid), ..at(path.clone()) }).unwrap();
        assert_eq!(mode(), 0o660);
        drop(listening);
        let nobody = bind(&SocketConfig { group: Some("no-such-group-here".to_owned()), ..at(path.clone()) });
        assert!(matches!(nobody, Err(SocketError::Group { .. })));
        assert!(!path.exists(), "nothing is made before the group is known");
    }

    #[tokio::test]
    async fn a_socket_that_nobody_serves_is_taken_over_and_all_else_is_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("w.sock");
        // As a killed agent leaves it: a listener of std's does not remove its file.
        drop(StdUnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let first = bind(&at(path.clone())).unwrap();
        assert!(matches!(bind(&at(path.clone())), Err(SocketError::InUse { .. })));
        drop(first);

        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&at(path.clone())), Err(SocketError::Occupied { what: "no socket", .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
        let target = temp.path().join("other.sock");
        drop(StdUnixListener::bind(&target).unwrap());
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert!(matches!(bind(&at(path.clone())), Err(SocketError::Occupied { what: "no socket", .. })));
        assert!(target.exists());

        let lost = bind(&at(temp.path().join("no/such/dir.sock"))).unwrap_err();
        assert!(lost.to_string().contains("directory must exist"), "{lost}");
    }

    #[tokio::test]
    async fn a_file_that_took_the_socket_s_place_is_not_removed() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("w.sock");
        let listening = bind(&at(path.clone())).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(listening);
        assert!(path.exists());
    }
}
