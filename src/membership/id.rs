//! Who a member is: its name, where it is reached and which life it lives.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::model::{Generation, NodeName};

/// One life of a member: the generation (one per start) and how often it came back within it.
///
/// The greater life wins a conflict; nothing that was said about a smaller one counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Life {
    /// Grows at each start.
    pub generation: Generation,
    /// Grows each time that the others took the member for failed and it came back.
    pub renewals: u32,
}

/// A member as SWIM names it. Its address, in SWIM's sense, is the name alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MeshId {
    /// Its name: unique among live members.
    pub name: NodeName,
    /// Which life.
    pub life: Life,
    /// Where its mesh port is reached.
    pub addr: SocketAddr,
}

impl MeshId {
    /// Names the first life of `generation`.
    pub fn new(name: NodeName, addr: SocketAddr, generation: Generation) -> Self {
        Self { name, addr, life: Life { generation, renewals: 0 } }
    }
}

impl foca::Identity for MeshId {
    type Addr = NodeName;

    fn renew(&self) -> Option<Self> {
        let renewals = self.life.renewals.checked_add(1)?;
        Some(Self { life: Life { renewals, ..self.life }, ..self.clone() })
    }

    fn addr(&self) -> NodeName {
        self.name.clone()
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        // The address decides between equal lives, so that everybody decides alike.
        (self.life, self.addr) > (adversary.life, adversary.addr)
    }
}
