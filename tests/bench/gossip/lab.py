"""Hosts as network namespaces, joined by a router that is a namespace too; counters of what each host sends.

  h0: eth0 10.98.1.1/32 --- p0 \\
  h1: eth0 10.98.1.2/32 --- p1  router 10.98.0.1: one /32 route per host, this process runs here
  ...                          /

A router and no bridge: the kernel's table of neighbours (1,024 entries by default) is one for all namespaces, and 200
hosts that all know each other's MAC address would overflow it. Each host knows the router alone, by permanent entries,
so that no ARP is counted. MTU 1500. Nothing outside these namespaces is touched."""
import contextlib, ctypes, os, subprocess

ROUTER = "10.98.0.1"
ETHERNET_BYTES = 14
# IPv6's announcements would be counted.
NO_IPV6 = "addrgenmode none" if os.path.exists("/proc/net/if_inet6") else ""
HZ = os.sysconf("SC_CLK_TCK")


def address(at):
    return f"10.98.{1 + at // 200}.{1 + at % 200}"


def mac(side, at):
    return f"02:00:00:{side:02x}:{at // 256:02x}:{at % 256:02x}"


def sh(*argv, text=None):
    done = subprocess.run(list(argv), input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")


class Lab:
    def __init__(self):
        self.prefix, self.hosts = f"wg{os.getpid()}", 0
        self.router = f"{self.prefix}-r"
        sh("ip", "netns", "add", self.router)
        sh("ip", "-n", self.router, "link", "set", "lo", "up")
        with open(f"/run/netns/{self.router}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")
        sh("ip", "addr", "add", f"{ROUTER}/32", "dev", "lo")
        with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
            file.write("1")

    def netns(self, at):
        return f"{self.prefix}-{at}"

    def grow(self, count):
        for at in range(self.hosts, count):
            ns, self.hosts = self.netns(at), at + 1
            sh("ip", "netns", "add", ns)
            sh("ip", "-batch", "-", text=f"""
                link add p{at} mtu 1500 address {mac(1, at)} type veth peer name eth0 netns {ns} mtu 1500 address {mac(2, at)}
                link set p{at} {NO_IPV6} up
                route add {address(at)}/32 dev p{at}
                neigh add {address(at)} lladdr {mac(2, at)} nud permanent dev p{at}""")
            sh("ip", "-n", ns, "-batch", "-", text=f"""
                link set lo up
                addr add {address(at)}/32 dev eth0
                link set eth0 {NO_IPV6} up
                neigh add {ROUTER} lladdr {mac(1, at)} nud permanent dev eth0
                route add default via {ROUTER} dev eth0 onlink""")

    def of(self, at, *argv):
        """The command, on a host; `ip` becomes it, so that the process id is its own."""
        return ["ip", "netns", "exec", self.netns(at), *argv]

    def cut(self, at):
        """From here on nothing reaches the host and nobody is told so."""
        sh("ip", "route", "replace", "blackhole", f"{address(at)}/32")

    def split(self, left, right):
        """Nothing passes between the two, both ways; this process still reaches all, as what it sends is not forwarded."""
        self.forward("split", *(
            f"ip saddr {{ {', '.join(map(address, a))} }} ip daddr {{ {', '.join(map(address, b))} }} drop"
            for a, b in ((left, right), (right, left))))

    def lossy(self, percent):
        """So much of the UDP between hosts is lost, each datagram by itself."""
        self.forward("loss", f"ip protocol udp numgen random mod 1000 < {round(10 * percent)} drop")

    def forward(self, table, *rules):
        """Rules of the router, which is a namespace of its own."""
        head = f"add table ip {table}; add chain ip {table} way {{ type filter hook forward priority 0; }}"
        sh("nft", "; ".join([head, *(f"add rule ip {table} way {rule}" for rule in rules)]))

    def pass_all(self, table):
        sh("nft", f"delete table ip {table}")

    def mend(self, count):
        for at in range(min(count, self.hosts)):
            sh("ip", "route", "replace", f"{address(at)}/32", "dev", f"p{at}")

    def sent(self):
        """What every host has sent: {host: (bytes of IP, packets)}."""
        rows = {}
        for line in open("/proc/net/dev"):
            name, colon, rest = line.partition(":")
            name = name.strip()
            if colon and name[0] == "p" and name[1:].isdigit():
                count = rest.split()
                rows[int(name[1:])] = (int(count[0]) - ETHERNET_BYTES * int(count[1]), int(count[1]))
        return rows

    def close(self):
        for name in [self.netns(at) for at in range(self.hosts)] + [self.router]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def cpu_seconds(pid):
    words = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / HZ


def wakeups(pid):
    """How often the process's threads have gone to sleep and come back."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            rows = open(f"/proc/{pid}/task/{thread}/status").read()
            total += int(rows.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    return total


def memory_kib(pid):
    """Resident memory: all of it, and what is this process's alone."""
    rows = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    return int(rows["VmRSS"].split()[0]), int(rows["RssAnon"].split()[0])
