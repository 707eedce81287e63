//! Who gets which certificates: the user of the calling process, as the kernel says, against what each service names.

use std::collections::BTreeSet;

use crate::model::ServiceName;
use crate::registry::LocalState;

/// The pair of a service's `Meta` that names the users whose processes may speak as the service: user names or numbers,
/// joined by commas.
pub const META_USER: &str = "workload-user";

/// The user of a process at the other end of the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    /// By `SO_PEERCRED`: of the moment at which it connected.
    pub(super) uid: u32,
    /// The user's name, if this host knows one.
    pub(super) user: Option<String>,
    /// The agent's own user.
    pub(super) agent_uid: u32,
}

impl Caller {
    /// Whether a service with this `Meta` pair is the caller's: its user is named, or nobody is and it is the agent's own
    /// user or root, who can read the agent's keys anyway.
    fn is_named(&self, users: Option<&str>) -> bool {
        let Some(users) = users else { return self.uid == self.agent_uid || self.uid == 0 };
        let is_own = |name: &str| match name.parse::<u32>() {
            Ok(uid) => uid == self.uid,
            Err(_) => self.user.as_deref() == Some(name),
        };
        users.split(',').map(str::trim).any(is_own)
    }

    /// The services whose certificates are the caller's, in order of name.
    pub(super) fn services(&self, state: &LocalState) -> BTreeSet<ServiceName> {
        let records = state.services.values().map(|service| &service.definition.record);
        let own = records.filter(|record| self.is_named(record.meta.get(META_USER).map(AsRef::as_ref)));
        own.map(|record| record.name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_for_the_users_that_it_names_and_else_for_the_agent_s_own() {
        #[track_caller]
        fn check(uid: u32, users: Option<&str>, want: bool) {
            let user = (uid == 1001).then(|| "web".to_owned());
            let caller = Caller { uid, user, agent_uid: 900 };
            assert_eq!(caller.is_named(users), want, "{uid} and {users:?}");
        }
        for (uid, want) in [(1001, false), (900, true), (0, true)] {
            check(uid, None, want);
        }
        for users in ["1001", "web", "db, web", "7,1001"] {
            check(1001, Some(users), true);
            check(1002, Some(users), false);
            // Named is named: nobody else, not the agent's user either.
            check(900, Some(users), false);
        }
        for nobody in ["", ",", "10011", "01001x", "we", "root"] {
            check(1001, Some(nobody), false);
        }
        // A host without a name for the user: only the number tells.
        let nameless = Caller { uid: 5, user: None, agent_uid: 900 };
        assert!(nameless.is_named(Some("5")) && !nameless.is_named(Some("")));
    }
}
