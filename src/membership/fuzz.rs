//! The fuzz target of this module; see `crate::fuzz`.

use super::packet::{PACKET_BYTES_MAX, inspect};
use super::{Core, MeshId, Output, Profile, Verdict};
use crate::model::Generation;

/// More outputs than one packet may cause.
const OUTPUTS_MAX: usize = 256;

/// A packet, to a node that knows one other member; every signature in it is taken for good.
pub(crate) fn packet(bytes: &[u8]) {
    let Ok(seen) = inspect(bytes, |_| false) else { return };
    let now = crate::clock::now();
    let id = |name: &str, last: u8| {
        let name = name.parse().expect("a fixed, well-formed name");
        MeshId::new(name, ([10, 0, 0, last], 8301).into(), Generation { number: 1, nonce: 1 })
    };
    let mut core = Core::new(id("own", 1), Profile::default(), 1, now);
    core.meet(&id("other", 2), now);
    settle(&mut core, now);
    let _refused = core.handle_packet(&seen.src.name, bytes, now);
    settle(&mut core, now);
    core.handle_timeout(core.poll_timeout());
    settle(&mut core, now);
    // The sender, the one that was known, and one for each statement that fits the packet.
    assert!(core.members().count() <= 2 + seen.broadcasts.len(), "members out of nothing");
}

fn settle(core: &mut Core, now: tokio::time::Instant) {
    let mut outputs = 0;
    while let Some(output) = core.poll_output() {
        outputs += 1;
        assert!(outputs < OUTPUTS_MAX, "one packet, {outputs} outputs");
        match output {
            Output::Send { packet, .. } => {
                assert!(packet.len() <= PACKET_BYTES_MAX, "a packet of {} bytes", packet.len());
                assert!(inspect(&packet, |_| false).is_ok(), "a packet that is not understood");
            }
            Output::Sign(statement) => core.handle_signed(&statement.with_signature(vec![1]), now),
            Output::Verify(statement) => {
                let message = statement.message().expect("what was decoded encodes");
                assert_eq!(statement.clone().with_signature(Vec::new()).message().ok(), Some(message));
                core.handle_verified(statement, Verdict::Holds, now);
            }
            _ => {}
        }
    }
}
