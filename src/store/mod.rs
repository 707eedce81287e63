//! What an agent keeps on disk: one redb file, `weft.redb`, in the data directory.
//!
//! ```text
//!   generation, node id, name, reset key, identity, peers -> `meta`
//!   services, checks, check statuses, nodes without an agent, token uses, documents -> a table each
//!                                                    all of it wire::encode'd
//!   records that all agents share -> `shared`, bytes as `gossip::shared` writes them
//!
//!   wall time of the last run -> the file `clock` beside it (`wall`): the one thing that is not fsynced
//! ```
//!
//! Invariants: a write is on disk (fsync) when its call returns, whole or not at all; the file is readable by its
//! owner alone, for it holds the node's key; one agent has it at a time; a file that does not fit is never deleted or
//! written over. After `kill -9` the database repairs itself as it opens.
//!
//! Every call blocks on the disk: async code goes through `tokio::task::spawn_blocking`.
//! Not here: what the values mean (`pki`, `registry`, `gossip`), and the CA's files (`pki`).

mod error;
mod tokens;
mod wall;

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use redb::{
    Builder, Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, StorageError, TableDefinition,
};
use serde::{Serialize, de::DeserializeOwned};
use tracing::warn;

pub use self::error::StoreError;
pub use self::tokens::TokenCount;
pub use self::wall::CLOCK_FILE;
use crate::clock;
use crate::model::{CheckId, HealthStatus, InstanceId, NodeName};
use crate::registry::{CheckDefinition, ExternalNode, ServiceDefinition};
use crate::wire::{self, FRAME_BYTES_MAX};

/// The file's name in the data directory.
pub const STORE_FILE: &str = "weft.redb";

/// Pages that redb keeps in memory, in bytes: the whole file is a few hundred KiB, its own default is 1 GiB.
const CACHE_BYTES: usize = 4 * 1024 * 1024;

/// A commit that takes longer is told: on a healthy disk it takes milliseconds.
const COMMIT_SLOW: Duration = Duration::from_secs(1);
type Table = TableDefinition<'static, &'static str, &'static [u8]>;

const META: Table = TableDefinition::new("meta");
const SERVICES: Table = TableDefinition::new("services");
const CHECKS: Table = TableDefinition::new("checks");
const STATUSES: Table = TableDefinition::new("check_statuses");
const EXTERNALS: Table = TableDefinition::new("external_nodes");
const TOKENS: Table = TableDefinition::new("token_uses");
const DOCUMENTS: Table = TableDefinition::new("documents");
/// Raw bytes: values are larger than a message.
const SHARED: Table = TableDefinition::new("shared");

const GENERATION: &str = "generation";
const NODE_ID: &str = "node_id";
const NODE_NAME: &str = "node_name";
const RESET_KEY: &str = "reset_key";
const IDENTITY: &str = "identity";
const PEERS: &str = "peers";
const JOIN_KEY: &str = "join_key";
const JOIN_TOKEN: &str = "join_token";

/// A peer worth dialling at the next start.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StoredPeer {
    /// Its name.
    pub name: NodeName,
    /// Its mesh address.
    pub addr: SocketAddr,
    /// Whether it was alive when last heard of: alive ones are dialled first.
    pub alive: bool,
}

struct Inner {
    path: PathBuf,
    /// None only while, or after, a failed file could not be opened again.
    database: RwLock<Option<Database>>,
    kind: Kind,
    /// The disk refused something: redb then refuses everything until the file is opened again.
    has_failed: AtomicBool,
}

/// Where a store lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Memory,
}

/// What the agent keeps on disk. Every write is durable (fsync) when the call returns. Cheap to clone; calls block.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("path", &self.inner.path).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens or makes `dir/weft.redb`; makes the directory (mode 0700) and the file (mode 0600) where there is none.
    ///
    /// A file whose pages do not match their checksums is refused and left alone. A file that an agent left behind by
    /// a crash is repaired. The file stays locked until the last clone of the store is dropped.
    ///
    /// # Errors
    /// [`StoreError`]: the directory or the file cannot be used, another agent has it, or it is corrupt.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let in_dir = |source| StoreError::Directory { dir: dir.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(in_dir)?;
        let path = dir.join(STORE_FILE);
        let in_file = |source| StoreError::File { path: path.clone(), source };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(in_file)?;
        file.set_permissions(Permissions::from_mode(0o600)).map_err(in_file)?;
        // A new file's name is on disk only once its directory is.
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(in_dir)?;
        Self::start(path, Kind::File, |builder| builder.create_file(file))
    }

    /// Makes a store in memory, for `-dev` and tests.
    ///
    /// # Errors
    /// If the database refuses its first transaction.
    pub fn in_memory() -> Result<Self, StoreError> {
        let backend = redb::backends::InMemoryBackend::new();
        Self::start(PathBuf::from("memory"), Kind::Memory, |builder| builder.create_with_backend(backend))
    }

    /// Opens and makes the tables that are missing.
    fn start(
        path: PathBuf,
        kind: Kind,
        open: impl FnOnce(&mut Builder) -> Result<Database, DatabaseError>,
    ) -> Result<Self, StoreError> {
        let database = RwLock::new(Some(open_checked(&path, open)?));
        let store = Self { inner: Arc::new(Inner { path, database, kind, has_failed: AtomicBool::new(false) }) };
        store.write(|transaction| {
            for table in [META, SERVICES, CHECKS, STATUSES, EXTERNALS, TOKENS, DOCUMENTS, SHARED] {
                transaction.open_table(table)?;
            }
            Ok(())
        })?;
        Ok(store)
    }

    /// Adds one to the generation, on disk, and returns it; the first one is 1.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn next_generation(&self) -> Result<u64, StoreError> {
        let last: u64 = self.value(META, GENERATION)?.unwrap_or(0);
        let next = last.saturating_add(1);
        self.put(META, GENERATION, &next)?;
        Ok(next)
    }

    /// Returns the node's UUID, made at first use.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn node_id(&self) -> Result<String, StoreError> {
        if let Some(id) = self.value(META, NODE_ID)? {
            return Ok(id);
        }
        let id = uuid::Uuid::new_v4().to_string();
        self.put(META, NODE_ID, &id)?;
        Ok(id)
    }

    /// Returns QUIC's stateless-reset key: 64 random bytes made at first use.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn reset_key(&self) -> Result<[u8; 64], StoreError> {
        if let Some(kept) = self.value::<Vec<u8>>(META, RESET_KEY)?
            && let Ok(key) = <[u8; 64]>::try_from(kept)
        {
            return Ok(key);
        }
        let mut key = [0u8; 64];
        rand::fill(&mut key);
        self.put(META, RESET_KEY, &key.to_vec())?;
        Ok(key)
    }

    /// Returns what `NodeAuthority::to_bytes` gave.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn identity(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.value(META, IDENTITY)
    }

    /// Replaces the identity.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn put_identity(&self, bytes: &[u8]) -> Result<(), StoreError> {
        self.put(META, IDENTITY, &bytes.to_vec())
    }

    /// Returns the name of the node that this data directory belongs to.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn node_name(&self) -> Result<Option<NodeName>, StoreError> {
        self.value(META, NODE_NAME)
    }

    /// Sets the node's name.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn put_node_name(&self, name: &NodeName) -> Result<(), StoreError> {
        self.put(META, NODE_NAME, name)
    }

    /// Returns the peers that were known.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn peers(&self) -> Result<Vec<StoredPeer>, StoreError> {
        Ok(self.value(META, PEERS)?.unwrap_or_default())
    }

    /// Replaces the known peers.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails or the peers exceed one frame (256 KiB, some 3000 peers).
    pub fn put_peers(&self, peers: &[StoredPeer]) -> Result<(), StoreError> {
        self.put(META, PEERS, &peers)
    }

    /// Returns the services that were registered by the API.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn services(&self) -> Result<Vec<ServiceDefinition>, StoreError> {
        Ok(self.values(SERVICES)?.into_iter().map(|(_, service)| service).collect())
    }

    /// Adds or replaces a service.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn put_service(&self, definition: &ServiceDefinition) -> Result<(), StoreError> {
        self.put(SERVICES, definition.record.id.as_str(), definition)
    }

    /// Removes a service.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn remove_service(&self, id: &InstanceId) -> Result<(), StoreError> {
        self.remove(SERVICES, id.as_str())
    }

    /// Returns the checks that were registered by themselves.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn checks(&self) -> Result<Vec<CheckDefinition>, StoreError> {
        Ok(self.values(CHECKS)?.into_iter().map(|(_, check)| check).collect())
    }

    /// Adds or replaces a check.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn put_check(&self, definition: &CheckDefinition) -> Result<(), StoreError> {
        self.put(CHECKS, definition.id.as_str(), definition)
    }

    /// Removes a check and its status.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn remove_check(&self, id: &CheckId) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.open_table(CHECKS)?.remove(id.as_str())?;
            transaction.open_table(STATUSES)?.remove(id.as_str())?;
            Ok(())
        })
    }

    /// Puts a service in place and removes checks, in one commit.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails; nothing is changed then.
    pub(crate) fn replace_service(
        &self,
        definition: &ServiceDefinition,
        dropped: &[CheckId],
    ) -> Result<(), StoreError> {
        let id = definition.record.id.as_str();
        let bytes = encode(id, definition)?;
        self.write(|transaction| {
            transaction.open_table(SERVICES)?.insert(id, bytes.as_slice())?;
            remove_all(transaction, dropped)
        })
    }

    /// Removes a service together with checks and their statuses, in one commit.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails; nothing is changed then.
    pub(crate) fn forget_service(&self, id: &InstanceId, checks: &[CheckId]) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.open_table(SERVICES)?.remove(id.as_str())?;
            remove_all(transaction, checks)
        })
    }

    /// Returns the last status of each check, so that a restart does not flap.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn check_statuses(&self) -> Result<Vec<(CheckId, HealthStatus)>, StoreError> {
        let statuses = self.values::<HealthStatus>(STATUSES)?;
        // A key is what a check's id was written as, so each one parses.
        Ok(statuses.into_iter().filter_map(|(id, status)| Some((id.parse().ok()?, status))).collect())
    }

    /// Sets the status of one check.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn put_check_status(&self, id: &CheckId, status: HealthStatus) -> Result<(), StoreError> {
        self.put(STATUSES, id.as_str(), &status)
    }

    /// Sets the status of several checks, in one commit.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails; nothing is changed then.
    pub fn put_check_statuses(&self, statuses: &[(CheckId, HealthStatus)]) -> Result<(), StoreError> {
        let encode = |(id, status): &(CheckId, HealthStatus)| Ok((id.clone(), encode(id.as_str(), status)?));
        let encoded = statuses.iter().map(encode).collect::<Result<Vec<_>, StoreError>>()?;
        self.write(|transaction| {
            let mut table = transaction.open_table(STATUSES)?;
            for (id, bytes) in &encoded {
                table.insert(id.as_str(), bytes.as_slice())?;
            }
            Ok(())
        })
    }

    /// Returns the nodes without an agent that were written here, in order of name.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn externals(&self) -> Result<Vec<ExternalNode>, StoreError> {
        Ok(self.values(EXTERNALS)?.into_iter().map(|(_, node)| node).collect())
    }

    /// Adds or replaces a node without an agent.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn put_external(&self, node: &ExternalNode) -> Result<(), StoreError> {
        self.put(EXTERNALS, node.record.name.as_str(), node)
    }

    /// Removes a node without an agent, if it is there.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn remove_external(&self, name: &NodeName) -> Result<(), StoreError> {
        self.remove(EXTERNALS, name.as_str())
    }

    /// Returns the signed documents, in order of key.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn documents(&self) -> Result<Vec<Vec<u8>>, StoreError> {
        Ok(self.values(DOCUMENTS)?.into_iter().map(|(_, document)| document).collect())
    }

    /// Adds or replaces a signed document.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn put_document(&self, key: &str, document: &[u8]) -> Result<(), StoreError> {
        self.put(DOCUMENTS, key, document)
    }

    /// Removes a signed document.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn remove_document(&self, key: &str) -> Result<(), StoreError> {
        self.remove(DOCUMENTS, key)
    }

    /// Returns the records that all agents share, in order of name, but those whose name begins with `without`, whose pages
    /// are not read.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn shared(&self, without: Option<&str>) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let Some(without) = without else { return self.rows(SHARED) };
        let read = |database: &Database| -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
            let table = database.begin_read()?.open_table(SHARED)?;
            let mut rows = Vec::new();
            for row in table.range(..without)? {
                let (key, bytes) = row?;
                rows.push((key.value().to_owned(), bytes.value().to_vec()));
            }
            // No text that begins so is above it with the greatest character behind it, and none that does not lies between.
            let end = format!("{without}{}", char::MAX);
            for row in table.range(end.as_str()..)? {
                let (key, bytes) = row?;
                if !key.value().starts_with(without) {
                    rows.push((key.value().to_owned(), bytes.value().to_vec()));
                }
            }
            Ok(rows)
        };
        self.with(read)
    }

    /// Puts records that all agents share in place, or removes them where there are no bytes, in one commit.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails; nothing is changed then.
    pub fn write_shared(&self, changes: &[(String, Option<Vec<u8>>)]) -> Result<(), StoreError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(SHARED)?;
            for (name, bytes) in changes {
                match bytes {
                    Some(bytes) => table.insert(name.as_str(), bytes.as_slice())?,
                    None => table.remove(name.as_str())?,
                };
            }
            Ok(())
        })
    }

    /// Returns the key of a join that was begun and not answered.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn join_key(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.value(META, JOIN_KEY)
    }

    /// Keeps the key of a join that begins.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn put_join_key(&self, key: &[u8]) -> Result<(), StoreError> {
        self.put(META, JOIN_KEY, &key.to_vec())
    }

    /// Forgets the key of a join that was answered.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn remove_join_key(&self) -> Result<(), StoreError> {
        self.remove(META, JOIN_KEY)
    }

    /// Returns the id of the last token that this node showed to an issuer, or had no need of.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn join_token(&self) -> Result<Option<[u8; 16]>, StoreError> {
        self.value(META, JOIN_TOKEN)
    }

    /// Keeps the id of a token that needs no further look.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn put_join_token(&self, id: [u8; 16]) -> Result<(), StoreError> {
        self.put(META, JOIN_TOKEN, &id)
    }

    fn value<T: DeserializeOwned>(&self, table: Table, key: &str) -> Result<Option<T>, StoreError> {
        let read = |database: &Database| -> Result<Option<Vec<u8>>, redb::Error> {
            let table = database.begin_read()?.open_table(table)?;
            Ok(table.get(key)?.map(|bytes| bytes.value().to_vec()))
        };
        let bytes = self.with(read)?;
        bytes.map(|bytes| decode(&self.inner.path, table, key, &bytes)).transpose()
    }

    fn values<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(String, T)>, StoreError> {
        let decode_row = |(key, bytes): (String, Vec<u8>)| {
            let value = decode(&self.inner.path, table, &key, &bytes)?;
            Ok((key, value))
        };
        self.rows(table)?.into_iter().map(decode_row).collect()
    }

    fn rows(&self, table: Table) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let read = |database: &Database| -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
            let table = database.begin_read()?.open_table(table)?;
            let mut rows = Vec::new();
            for row in table.iter()? {
                let (key, bytes) = row?;
                rows.push((key.value().to_owned(), bytes.value().to_vec()));
            }
            Ok(rows)
        };
        self.with(read)
    }

    fn put<T: Serialize + ?Sized>(&self, table: Table, key: &str, value: &T) -> Result<(), StoreError> {
        let bytes = encode(key, &value)?;
        self.write(|transaction| {
            transaction.open_table(table)?.insert(key, bytes.as_slice())?;
            Ok(())
        })
    }

    fn remove(&self, table: Table, key: &str) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.open_table(table)?.remove(key)?;
            Ok(())
        })
    }

    /// Runs `change` in one transaction and commits it to the disk.
    fn write<T>(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        self.with(|database| {
            let transaction = database.begin_write()?;
            let value = change(&transaction)?;
            let begun = clock::now();
            transaction.commit()?;
            let took = clock::now() - begun;
            if took > COMMIT_SLOW {
                warn!(?took, "the disk was slow to take a write: registrations and joins wait for it");
            }
            Ok(value)
        })
    }

    /// Runs `work` on the database; opens the file again first if the disk had refused something.
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, StoreError> {
        if self.inner.has_failed.load(Ordering::Acquire) {
            self.reopen()?;
        }
        let held = self.inner.database.read().unwrap_or_else(PoisonError::into_inner);
        let Some(database) = held.as_ref() else { return Err(self.failed(redb::Error::PreviousIo)) };
        work(database).map_err(|error| self.failed(error))
    }

    fn reopen(&self) -> Result<(), StoreError> {
        let path = &self.inner.path;
        let mut held = self.inner.database.write().unwrap_or_else(PoisonError::into_inner);
        if !self.inner.has_failed.load(Ordering::Acquire) {
            return Ok(());
        }
        // The old handle holds the file's lock.
        drop(held.take());
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|source| StoreError::File { path: path.clone(), source })?;
        *held = Some(open_checked(path, |builder| builder.create_file(file))?);
        self.inner.has_failed.store(false, Ordering::Release);
        tracing::info!(path = %path.display(), "opened the store again after the disk had refused");
        Ok(())
    }

    fn failed(&self, error: redb::Error) -> StoreError {
        let path = self.inner.path.clone();
        if matches!(error, redb::Error::Io(_) | redb::Error::PreviousIo) && self.inner.kind == Kind::File {
            // Once, until the file is opened again: the agent lives on what it has in memory.
            if !self.inner.has_failed.swap(true, Ordering::AcqRel) {
                tracing::error!(path = %path.display(), %error, "the disk refused: what is known is served on, what must be kept is refused until it takes writes");
            }
        }
        match error {
            redb::Error::Corrupted(reason) => StoreError::Corrupt { path, reason },
            source => StoreError::Transaction { path, source: Box::new(source) },
        }
    }
}

/// Opens a database and checks every page against its checksum.
fn open_checked(
    path: &Path,
    open: impl FnOnce(&mut Builder) -> Result<Database, DatabaseError>,
) -> Result<Database, StoreError> {
    let path = path.to_owned();
    // redb asserts where a damaged file contradicts itself: that must end as an error, too.
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let mut database = open(Builder::new().set_cache_size(CACHE_BYTES))?;
        let clean = database.check_integrity()?;
        Ok((database, clean))
    }));
    let (database, clean) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(error)) => return Err(open_error(path, error)),
        Err(_panic) => return Err(StoreError::Corrupt { path, reason: "its pages contradict each other".into() }),
    };
    if !clean {
        tracing::warn!(path = %path.display(), "repaired the store");
    }
    Ok(database)
}

fn remove_all(transaction: &redb::WriteTransaction, checks: &[CheckId]) -> Result<(), redb::Error> {
    let mut definitions = transaction.open_table(CHECKS)?;
    let mut statuses = transaction.open_table(STATUSES)?;
    for id in checks {
        definitions.remove(id.as_str())?;
        statuses.remove(id.as_str())?;
    }
    Ok(())
}

fn encode<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>, StoreError> {
    wire::encode(value).map_err(|source| StoreError::Encode { key: key.to_owned(), source })
}

fn decode<T: DeserializeOwned>(path: &Path, table: Table, key: &str, bytes: &[u8]) -> Result<T, StoreError> {
    wire::decode(bytes, FRAME_BYTES_MAX).map_err(|source| {
        use redb::TableHandle as _;
        let table = match table.name() {
            "meta" => "meta",
            "services" => "services",
            "checks" => "checks",
            "check_statuses" => "check_statuses",
            "external_nodes" => "external_nodes",
            "documents" => "documents",
            _ => "token_uses",
        };
        StoreError::Value { path: path.to_owned(), table, key: key.to_owned(), source }
    })
}

fn open_error(path: PathBuf, error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::Locked { path },
        DatabaseError::UpgradeRequired(found) => StoreError::Format { path, found },
        DatabaseError::Storage(StorageError::Corrupted(reason)) => StoreError::Corrupt { path, reason },
        // redb's word for a file that is no database, or one that was cut short.
        DatabaseError::Storage(StorageError::Io(source))
            if matches!(source.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof) =>
        {
            StoreError::Corrupt { path, reason: source.to_string() }
        }
        DatabaseError::Storage(StorageError::Io(source)) => StoreError::File { path, source },
        other => StoreError::Transaction { path, source: Box::new(other.into()) },
    }
}

#[cfg(test)]
mod tests;
