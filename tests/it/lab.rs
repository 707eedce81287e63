//! Hosts as network namespaces: each with a veth into one bridge, MTU 1500; the bridge has a namespace of its own, so
//! that nothing outside is touched.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

static LABS: AtomicU32 = AtomicU32::new(0);
/// Labs run one after the other: two cores carry one cluster well, not five.
static TURN: Mutex<()> = Mutex::new(());

/// Namespaces joined by a bridge; removed when dropped.
pub(crate) struct Lab {
    prefix: String,
    hosts: Vec<Host>,
    _turn: MutexGuard<'static, ()>,
}

/// One host of a lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// The namespace's name.
    pub(crate) netns: String,
    /// Its address on the bridge.
    pub(crate) ip: IpAddr,
}

impl Lab {
    /// Makes `hosts` hosts, 10.77.0.1 and on; none where namespaces cannot be made (and `WEFT_REQUIRE_NETNS` is unset).
    #[track_caller]
    pub(crate) fn new(hosts: u8) -> Option<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let prefix = format!("wf{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let mut lab = Self { prefix, hosts: Vec::new(), _turn: turn };
        match lab.build(hosts) {
            Ok(()) => Some(lab),
            Err(why) if std::env::var_os("WEFT_REQUIRE_NETNS").is_some_and(|v| v == "1") => {
                panic!("WEFT_REQUIRE_NETNS=1 and no network namespaces: {why}")
            }
            Err(why) => {
                eprintln!("SKIPPED: needs root and network namespaces: {why}");
                None
            }
        }
    }

    fn build(&mut self, hosts: u8) -> Result<(), String> {
        let hub = format!("{}-hub", self.prefix);
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "br0", "up"])?;
        for number in 1..=hosts {
            let netns = format!("{}-{number}", self.prefix);
            ip(&["netns", "add", &netns])?;
            let addr = Ipv4Addr::new(10, 77, 0, number);
            self.hosts.push(Host { netns: netns.clone(), ip: addr.into() });
            let port = format!("p{number}");
            ip(&[
                "-n", &netns, "link", "add", "eth0", "mtu", "1500", "type", "veth", "peer", "name", &port, "netns",
                &hub,
            ])?;
            ip(&["-n", &hub, "link", "set", &port, "master", "br0", "up"])?;
            ip(&["-n", &netns, "addr", "add", &format!("{addr}/24"), "dev", "eth0"])?;
            ip(&["-n", &netns, "link", "set", "eth0", "up"])?;
            ip(&["-n", &netns, "link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    /// Returns host `number`, counted from 1.
    pub(crate) fn host(&self, number: usize) -> Host {
        self.hosts[number - 1].clone()
    }

    /// Drops all UDP between `a` and every other host, both ways, in `a`'s own namespace.
    #[track_caller]
    pub(crate) fn cut(&self, a: &Host) {
        let rules = "add table inet cut; add chain inet cut in { type filter hook input priority 0; }; \
                     add chain inet cut out { type filter hook output priority 0; }; \
                     add rule inet cut in iifname eth0 drop; add rule inet cut out oifname eth0 drop";
        run(Command::new("ip").args(["netns", "exec", &a.netns, "nft", rules])).unwrap();
    }

    /// Drops everything between the hosts of `a` and those of `b`, both ways; within each side all goes on.
    #[track_caller]
    pub(crate) fn split(&self, a: &[Host], b: &[Host]) {
        for (side, others) in [(a, b), (b, a)] {
            let others: Vec<String> = others.iter().map(|host| host.ip.to_string()).collect();
            let rules = format!(
                "add table inet cut; add chain inet cut in {{ type filter hook input priority 0; }}; \
                 add rule inet cut in ip saddr {{ {} }} drop",
                others.join(", ")
            );
            for host in side {
                run(Command::new("ip").args(["netns", "exec", &host.netns, "nft", &rules])).unwrap();
            }
        }
    }

    /// Undoes [`Lab::cut`], and [`Lab::split`] on one host.
    #[track_caller]
    pub(crate) fn heal(&self, a: &Host) {
        run(Command::new("ip").args(["netns", "exec", &a.netns, "nft", "delete table inet cut"])).unwrap();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let names = self.hosts.iter().map(|host| host.netns.clone()).chain([format!("{}-hub", self.prefix)]);
        for name in names {
            if let Err(why) = ip(&["netns", "del", &name]) {
                eprintln!("namespace {name} stays: {why}");
            }
        }
    }
}

impl Host {
    /// Runs `work` on a thread that has entered this host's namespace.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into this host's namespace, for good.
    pub(crate) fn enter(&self) {
        let file = std::fs::File::open(format!("/run/netns/{}", self.netns)).expect("the namespace exists");
        nix::sched::setns(file.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).expect("root may enter its namespaces");
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    run(Command::new("ip").args(args))
}

fn run(command: &mut Command) -> Result<(), String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim()))
}
