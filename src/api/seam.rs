//! The two narrow views of registry and gossip that handlers use: tests put fakes in their place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::gossip::{
    Answer, DocumentsView, GossipError, GossipHandle, Members, NodeCertificates, OfferError, SharedError, SharedHandle,
    Space, Spread, Write,
};
use crate::lww::Scope;
use crate::model::{CheckId, HealthStatus, InstanceId, NodeName, ServiceName};
use crate::pki::{PkiError, Svid, TrustBundle};
use crate::registry::{
    CheckDefinition, ExternalPart, ExternalWrite, LocalState, RegistryError, RegistryHandle, ServiceDefinition,
};

/// What a client may ask of the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RegistryOrder {
    RegisterService { definition: Box<ServiceDefinition>, replace_existing_checks: bool },
    DeregisterService(InstanceId),
    RegisterCheck(Box<CheckDefinition>),
    DeregisterCheck(CheckId),
    UpdateTtl { id: CheckId, status: HealthStatus, output: String },
    RegisterExternal(Box<ExternalWrite>),
    DeregisterExternal { node: NodeName, part: ExternalPart },
}

/// The registry as the API sees it.
pub(super) trait Registry: Send + Sync {
    /// What is registered on this node.
    fn state(&self) -> Arc<LocalState>;
    /// Wakes at each change of a service or a status.
    fn subscribe(&self) -> watch::Receiver<Arc<LocalState>>;
    /// Carries out `order`; done when it is on disk and published.
    fn carry_out(&self, order: RegistryOrder) -> BoxFuture<'_, Result<(), RegistryError>>;
}

impl Registry for RegistryHandle {
    fn state(&self) -> Arc<LocalState> {
        Self::state(self)
    }

    fn subscribe(&self) -> watch::Receiver<Arc<LocalState>> {
        Self::subscribe(self)
    }

    fn carry_out(&self, order: RegistryOrder) -> BoxFuture<'_, Result<(), RegistryError>> {
        Box::pin(async move {
            match order {
                RegistryOrder::RegisterService { definition, replace_existing_checks } => {
                    self.register_service(*definition, replace_existing_checks).await
                }
                RegistryOrder::DeregisterService(id) => self.deregister_service(id).await,
                RegistryOrder::RegisterCheck(definition) => self.register_check(*definition).await,
                RegistryOrder::DeregisterCheck(id) => self.deregister_check(id).await,
                RegistryOrder::UpdateTtl { id, status, output } => self.update_ttl(id, status, output).await,
                RegistryOrder::RegisterExternal(write) => self.register_external(*write).await,
                RegistryOrder::DeregisterExternal { node, part } => self.deregister_external(node, part).await,
            }
        })
    }
}

/// The node's certificates as the API sees them.
pub(super) trait Authority: Send + Sync {
    /// What is trusted, with the index of the last change to the roots.
    fn bundle(&self) -> (Arc<TrustBundle>, u64);
    /// A service's certificate, with the index of its last renewal.
    fn svid(&self, service: &ServiceName) -> Result<(Arc<Svid>, u64), PkiError>;
    /// Wakes after each change to either.
    fn subscribe(&self) -> watch::Receiver<()>;
}

/// What all agents share, as the API sees it.
pub(super) trait Records: Send + Sync {
    /// What `scope` holds here.
    fn read(&self, space: Space, scope: Scope) -> BoxFuture<'_, Result<Answer, SharedError>>;
    /// Ends once the index of `scope` is above `index`.
    fn changed(&self, space: Space, scope: Scope, index: u64) -> BoxFuture<'_, Result<(), SharedError>>;
    /// Carries out `write`; done when it is on disk.
    fn write(&self, space: Space, write: Write) -> BoxFuture<'_, Result<(), SharedError>>;
}

impl Records for SharedHandle {
    fn read(&self, space: Space, scope: Scope) -> BoxFuture<'_, Result<Answer, SharedError>> {
        Box::pin(Self::read(self, space, scope))
    }

    fn changed(&self, space: Space, scope: Scope, index: u64) -> BoxFuture<'_, Result<(), SharedError>> {
        Box::pin(Self::changed(self, space, scope, index))
    }

    fn write(&self, space: Space, write: Write) -> BoxFuture<'_, Result<(), SharedError>> {
        Box::pin(Self::write(self, space, write))
    }
}

/// What a client may ask of gossip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum GossipOrder {
    Join(String),
    ForceLeave { name: NodeName, prune: bool },
}

/// Gossip as the API sees it.
pub(super) trait Membership: Send + Sync {
    /// The members, in order of name.
    fn members(&self) -> Arc<Members>;
    /// Carries out `order`.
    fn carry_out(&self, order: GossipOrder) -> BoxFuture<'_, Result<(), GossipError>>;
    /// Takes a signed document, and returns how far it has spread.
    fn offer(&self, document: Vec<u8>) -> BoxFuture<'_, Result<Spread, OfferError>>;
    /// The signed documents.
    fn documents(&self) -> Arc<DocumentsView>;
    /// Measured round trips to the nodes that connections lead to.
    fn round_trips(&self) -> BoxFuture<'_, Result<BTreeMap<NodeName, Duration>, GossipError>>;
    /// What the agent of `peer` measured, as it tells it; none if it cannot be asked.
    fn round_trips_of(
        &self,
        peer: NodeName,
    ) -> BoxFuture<'_, Result<Option<BTreeMap<NodeName, Duration>>, GossipError>>;
    /// The certificates under which nodes publish.
    fn certificates(&self) -> BoxFuture<'_, Result<Vec<NodeCertificates>, GossipError>>;
    /// The hash of all records that are held here.
    fn records_hash(&self) -> BoxFuture<'_, Result<u64, GossipError>>;
}

impl Membership for GossipHandle {
    fn members(&self) -> Arc<Members> {
        Self::members(self)
    }

    fn carry_out(&self, order: GossipOrder) -> BoxFuture<'_, Result<(), GossipError>> {
        Box::pin(async move {
            match order {
                GossipOrder::Join(target) => self.join(vec![target]).await.map(drop),
                GossipOrder::ForceLeave { name, prune } => self.force_leave(name, prune).await,
            }
        })
    }

    fn offer(&self, document: Vec<u8>) -> BoxFuture<'_, Result<Spread, OfferError>> {
        Box::pin(GossipHandle::documents(self).offer(document))
    }

    fn documents(&self) -> Arc<DocumentsView> {
        GossipHandle::documents(self).view()
    }

    fn round_trips(&self) -> BoxFuture<'_, Result<BTreeMap<NodeName, Duration>, GossipError>> {
        Box::pin(GossipHandle::round_trips(self))
    }

    fn round_trips_of(
        &self,
        peer: NodeName,
    ) -> BoxFuture<'_, Result<Option<BTreeMap<NodeName, Duration>>, GossipError>> {
        Box::pin(GossipHandle::round_trips_of(self, peer))
    }

    fn certificates(&self) -> BoxFuture<'_, Result<Vec<NodeCertificates>, GossipError>> {
        Box::pin(GossipHandle::certificates(self))
    }

    fn records_hash(&self) -> BoxFuture<'_, Result<u64, GossipError>> {
        Box::pin(GossipHandle::records_hash(self))
    }
}
