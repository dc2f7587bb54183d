// SPDX-License-Identifier: Apache-2.0
//! The Unix socket that the agent listens on, from its making to its removal.
//!
//! Whoever can write to the socket commands every guest on the host. It is therefore made under a second name, with no
//! rights for anybody but the owner, gets its group and mode there, and only then the name that clients know. At no
//! moment is it reachable by more people than configured.

use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _,
};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::Mode;
use nix::unistd::Group;
use thiserror::Error;
use tokio::net::UnixListener;

/// Connections that may wait to be accepted: as many as the kernel allows (`net.core.somaxconn`), because a
/// client that does not block is turned away at once when they are too many.
const BACKLOG: Backlog = Backlog::MAXALLOWABLE;

/// The mode of a folder that is made for the socket: clients must be able to pass through.
const FOLDER_MODE: u32 = 0o755;

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// One of the calls failed.
    #[error("cannot {doing} {path:?}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// The file it was done to.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Somebody answers there.
    #[error("another process listens on {path:?}; stop it or set another address in listen")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The path is taken by something that is not ours to remove.
    #[error("{path:?} exists and is not a socket; remove it or set another address in listen")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// There is no such group.
    #[error("there is no group {group:?}; create it or change socket_group")]
    Group {
        /// The configured name.
        group: String,
    },
}

/// What a socket is to be.
#[derive(Debug, Clone)]
pub struct SocketOptions<'a> {
    /// Its absolute path. It must leave five bytes of what a socket's path may have, for the second name.
    pub path: &'a Path,
    /// Its mode, for example `0o660`.
    pub mode: u32,
    /// The group that it is given to, if any.
    pub group: Option<&'a str>,
}

/// Removes the socket when it is dropped, unless somebody else has put another one there.
#[derive(Debug)]
pub struct SocketGuard {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketGuard {
    fn drop(&mut self) {
        let ours = |found: Metadata| found.dev() == self.device && found.ino() == self.inode;
        if fs::symlink_metadata(&self.path).is_ok_and(ours)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}

/// Makes the socket and listens on it. Must be called within a tokio runtime.
///
/// A socket that a dead process left is replaced; one that answers is not.
///
/// # Errors
/// The path is in use or not a socket, there is no such group, or the system refuses.
pub fn bind(options: &SocketOptions<'_>) -> Result<(UnixListener, SocketGuard), SocketError> {
    let path = options.path;
    let group = options.group.map(find_group).transpose()?;
    if let Some(folder) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(FOLDER_MODE)
            .create(folder)
            .map_err(at("make the folder", folder))?;
    }
    check_free(path)?;

    let hidden = hidden_name(path);
    match fs::remove_file(&hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(at("remove", &hidden)(error));
        }
        _ => {}
    }
    let listener = listen(&hidden).map_err(at("listen on", &hidden))?;
    let finish = || {
        std::os::unix::fs::chown(&hidden, None, group).map_err(at("set the group of", &hidden))?;
        let mode = fs::Permissions::from_mode(options.mode);
        fs::set_permissions(&hidden, mode).map_err(at("set the mode of", &hidden))?;
        let made = fs::symlink_metadata(&hidden).map_err(at("look at", &hidden))?;
        let listener = UnixListener::from_std(listener).map_err(at("listen on", &hidden))?;
        fs::rename(&hidden, path).map_err(at("make", path))?;
        let guard = SocketGuard {
            path: path.to_path_buf(),
            device: made.dev(),
            inode: made.ino(),
        };
        Ok((listener, guard))
    };
    finish().inspect_err(|_| {
        // The failure is already being reported; a leftover is replaced by the next start.
        let _ = fs::remove_file(&hidden);
    })
}

fn at<'p>(doing: &'static str, path: &'p Path) -> impl Fn(io::Error) -> SocketError + 'p {
    move |source| SocketError::System {
        doing,
        path: path.to_path_buf(),
        source,
    }
}

fn find_group(name: &str) -> Result<u32, SocketError> {
    Group::from_name(name)
        .map_err(|errno| at("look up the group", Path::new(name))(errno.into()))?
        .map(|group| group.gid.as_raw())
        .ok_or_else(|| SocketError::Group {
            group: name.to_owned(),
        })
}

/// Succeeds when nobody listens on `path`: it does not exist, or a dead process left it.
fn check_free(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at("look at", path)(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket {
                path: path.to_path_buf(),
            });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse {
            path: path.to_path_buf(),
        }),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Ok(()),
            // A full backlog, or no rights: somebody may be there.
            _ => Err(at("find out who listens on", path)(error)),
        },
    }
}

/// The name under which the socket is made: in the same folder, five bytes longer.
fn hidden_name(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    path.with_file_name(name)
}

/// A listening socket at `path` with mode 0600 from its first moment: Linux gives the new file the mode of the socket's
/// own inode, less the umask (unix(7)).
fn listen(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    nix::sys::stat::fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let address = UnixAddr::new(path.as_os_str().as_bytes())?;
    nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &address)?;
    nix::sys::socket::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Read as _;

    use super::*;

    fn options(path: &Path) -> SocketOptions<'_> {
        SocketOptions {
            path,
            mode: 0o660,
            group: None,
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn the_socket_has_its_mode_and_accepts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/salvor/s.sock");
        let (listener, guard) = bind(&options(&path)).unwrap();
        assert_eq!(mode(&path), 0o660);
        assert!(!hidden_name(&path).exists());
        let mut client = UnixStream::connect(&path).unwrap();
        drop(listener.accept().await.unwrap());
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        drop(guard);
        assert!(!path.exists());
    }

    #[test]
    fn the_socket_is_never_wider_than_its_owner_before_it_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let _listener = listen(&path).unwrap();
        assert_eq!(mode(&path) & !0o600, 0);
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        fs::write(hidden_name(&path), "left by a crash").unwrap();

        let (_listener, _guard) = bind(&options(&path)).unwrap();
        let error = bind(&options(&path)).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(
            bind(&options(&path)),
            Err(SocketError::NotASocket { .. })
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");

        // Nor is a link followed to a socket of somebody else.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(
            bind(&options(&link)),
            Err(SocketError::NotASocket { .. })
        ));
    }

    #[tokio::test]
    async fn somebody_elses_socket_is_not_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let (listener, guard) = bind(&options(&path)).unwrap();
        let other = dir.path().join("other.sock");
        let _other = std::os::unix::net::UnixListener::bind(&other).unwrap();
        fs::rename(&other, &path).unwrap();
        drop((listener, guard));
        assert!(path.exists());
    }

    #[tokio::test]
    async fn an_unknown_group_is_refused_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/s.sock");
        let group = Some("no-such-group-here");
        let error = bind(&SocketOptions {
            group,
            ..options(&path)
        })
        .unwrap_err();
        assert!(error.to_string().contains("socket_group"), "{error}");
        assert!(!dir.path().join("run").exists());
    }

    #[tokio::test]
    async fn the_group_is_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        // The one group that everybody may give a file to is the own one.
        let own = Group::from_gid(nix::unistd::getegid()).unwrap().unwrap();
        let options = SocketOptions {
            group: Some(&own.name),
            mode: 0o600,
            ..options(&path)
        };
        let (_listener, _guard) = bind(&options).unwrap();
        let found = fs::symlink_metadata(&path).unwrap();
        assert_eq!(found.gid(), own.gid.as_raw());
        assert_eq!(mode(&path), 0o600);
    }
}
