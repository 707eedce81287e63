//! Seeds that are names: they are resolved again, as long as nobody answers.

use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, path};
use crate::lab::{Host, Lab};
use crate::wait::{until, until_within};

/// `/etc/hosts` as programs see it that `ip netns exec` starts on one host: it puts `/etc/netns/NAME/hosts` in its place.
/// Removed when dropped.
struct HostsFile {
    dir: PathBuf,
    /// The directories above it that were not there before.
    made: Vec<PathBuf>,
}

impl HostsFile {
    /// Must be there before the program starts.
    fn on(host: &Host, addr: &str) -> Self {
        let root = PathBuf::from("/etc/netns");
        let dir = root.join(&host.netns);
        let made = [dir.clone(), root].into_iter().filter(|dir| !dir.exists()).collect();
        std::fs::create_dir_all(&dir).unwrap();
        let file = Self { dir, made };
        file.lead_to(addr);
        file
    }

    /// Lets `seed.test` lead to `addr`. Written in place: the programs see this very file.
    fn lead_to(&self, addr: &str) {
        std::fs::write(self.dir.join("hosts"), format!("127.0.0.1 localhost\n{addr} seed.test\n")).unwrap();
    }
}

impl Drop for HostsFile {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(self.dir.join("hosts"));
        for dir in &self.made {
            // Another run may have put something there.
            let _in_use = std::fs::remove_dir(dir);
        }
    }
}

#[test]
fn the_name_of_a_seed_is_resolved_again_until_somebody_answers() {
    let Some(lab) = Lab::new(3) else { return };
    let ca = Ca::init("lab.test");
    let issuer = ca.issuer();
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer)]));
    // Nobody has this address.
    let host = lab.host(2);
    let names = HostsFile::on(&host, "10.77.0.99");
    let token = ca.token("n*", "*", "1h");
    let spec = Spec::on(&host, "n2", &["-join", "seed.test", "-token", &token]);
    let n2 = Agent::spawn(&spec, TempDir::new().unwrap());
    until("the newcomer has asked in vain", || {
        let log = n2.log();
        if log.contains("no certificate yet") { Ok(()) } else { Err(log) }
    });
    names.lead_to("10.77.0.1");
    n2.wait_ready();
    for agent in [&n1, &n2] {
        agent.wait_members(&["n1=1", "n2=1"]);
    }

    // The seed is gone for good, and its name leads to another, which knows of nobody: the one that is alone finds it by the name.
    drop(n1);
    n2.wait_members(&["n1=4", "n2=1"]);
    names.lead_to("10.77.0.3");
    let n3 = Agent::start(&Spec::on(&lab.host(3), "n3", &["-issuer", path(&issuer)]));
    for agent in [&n2, &n3] {
        // Whoever is alone calls at least every 30 s, and for 4 s each address.
        until_within(Duration::from_secs(45), &format!("{} sees both", agent.name), || {
            let seen = agent.members()?;
            let is_there = |member: &str| seen.iter().any(|one| one == member);
            if is_there("n2=1") && is_there("n3=1") { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    }
}
