"""A mesh of real agents in network namespaces: hosts on one bridge, MTU 1500.  Only the standard library is used.

  a (caller) --+
  b (server) --+-- bridge in a namespace of its own
  c (crowd)  --+   c holds many addresses, one agent on each

Every namespace, directory and process is made here and taken away here (processes by pid only)."""
import contextlib, json, os, re, shutil, signal, subprocess, tempfile, time

PREFIX = os.environ.get("WSCALE_NS", f"ws{os.getpid()}")
HZ = os.sysconf("SC_CLK_TCK")
IPS = dict(a="10.96.0.1", b="10.96.0.2")
API = 8500


def sh(*cmd, check=True):
    return subprocess.run(list(cmd), check=check, text=True, capture_output=True)


def of(host, *cmd):
    """The command, inside a host."""
    return ["ip", "netns", "exec", f"{PREFIX}-{host}", *map(str, cmd)]


def cpu_s(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / HZ


def rss_kib(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read()).group(1))


def children(pid):
    with contextlib.suppress(OSError):
        return [int(x) for x in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    return []


class Agent:
    def __init__(self, mesh, node, host, ip, api, process):
        self.mesh, self.node, self.host, self.ip, self.api, self.process = mesh, node, host, ip, api, process

    @property
    def pid(self):
        return self.process.pid

    def calls(self, *requests):
        """Sends requests (method, path, body) to the agent's API, one connection; returns the last answer."""
        out = subprocess.run(of(self.host, "python3", "-c", CLIENT, self.api), input=json.dumps(requests), text=True, capture_output=True)
        if out.returncode:
            raise RuntimeError(f"{self.node}: {out.stderr.strip()[-300:]}")
        return out.stdout

    def get(self, path):
        return json.loads(self.calls(("GET", path, None)))

    def register(self, *services):
        self.calls(*[("PUT", "/v1/agent/service/register", s) for s in services])

    def deregister(self, *ids):
        self.calls(*[("PUT", f"/v1/agent/service/deregister/{i}", None) for i in ids])

    def metric(self, start, *labels):
        text = self.calls(("GET", "/v1/agent/metrics?format=prometheus", None))
        return sum(float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(start) and all(i in x for i in labels))


CLIENT = """
import http.client, json, sys
c = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
for method, path, body in json.load(sys.stdin):
    c.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    r = c.getresponse()
    text = r.read().decode()
    if r.status != 200:
        sys.exit(f"{method} {path}: {r.status} {text}")
print(text, end="")
"""

NGINX = """worker_processes 1; daemon off; user root; pid {d}/nginx.pid; error_log {d}/err.log warn;
events {{ worker_connections 16384; }}
http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 3600s; tcp_nodelay on;
  client_body_temp_path {d}/t1; proxy_temp_path {d}/t2; fastcgi_temp_path {d}/t3; uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;
  server {{ listen 127.0.0.1:8080 backlog=8192; location / {{ return 200 "hello from the backend\\n"; }} }} }}
"""


class Mesh:
    def __init__(self, weft, workers):
        self.weft, self.workers = weft, workers
        self.dir = tempfile.mkdtemp(prefix="wscale-")
        self.live = []

    def __enter__(self):
        try:
            self.network()
            sh(self.weft, "ca", "init", "-dir", self.dir + "/ca", "-trust-domain", "bench.test")
            token = sh(self.weft, "token", "create", "-ca", self.dir + "/ca", "-node", "*", "-serve", "*", "-ttl", "24h").stdout
            self.token = re.search(r"^weft1-\S+", token, re.M).group(0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for p in self.live:
            # The parent first: nginx starts another worker for one that is killed.
            workers = children(p.pid)
            p.kill()
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for p in self.live:
            with contextlib.suppress(subprocess.TimeoutExpired):
                p.wait(5)
        for host in ("a", "b", "c", "hub"):
            sh("ip", "netns", "del", f"{PREFIX}-{host}", check=False)
        shutil.rmtree(self.dir, ignore_errors=True)

    def network(self):
        hub = f"{PREFIX}-hub"
        sh("ip", "netns", "add", hub)
        sh("ip", "-n", hub, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", hub, "link", "set", "br0", "up")
        for host in ("a", "b", "c"):
            ns = f"{PREFIX}-{host}"
            sh("ip", "netns", "add", ns)
            sh("ip", "-n", ns, "link", "add", "eth0", "mtu", "1500", "type", "veth", "peer", "name", f"p{host}", "netns", hub)
            sh("ip", "-n", hub, "link", "set", f"p{host}", "master", "br0", "up")
            for ip in [IPS[host]] if host in IPS else [self.crowd_ip(i) for i in range(100)]:
                sh("ip", "-n", ns, "addr", "add", f"{ip}/16", "dev", "eth0")
            sh("ip", "-n", ns, "link", "set", "eth0", "up")
            sh("ip", "-n", ns, "link", "set", "lo", "up")
            sh(*of(host, "sysctl", "-qw", "net.ipv4.ip_local_port_range=16384 65535"), check=False)

    @staticmethod
    def crowd_ip(i):
        return f"10.96.1.{i + 1}"

    def start(self, host, cmd, name):
        log = open(f"{self.dir}/{name}.log", "ab")
        p = subprocess.Popen(of(host, *cmd), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        self.live.append(p)
        return p

    def write_config(self, entry):
        """Signs a config entry, as an operator would, and brings it to b."""
        operator = self.dir + "/bench.operator"
        if not os.path.exists(operator):
            sh(self.weft, "ca", "operator", "create", "-name", "bench", "-may", "config", "-ca", self.dir + "/ca", "-out", operator)
        out = subprocess.run(of("b", self.weft, "config", "write", "-operator", operator, "-"), input=json.dumps(entry), text=True, capture_output=True)
        if out.returncode:
            raise RuntimeError(f"weft config write: {out.stderr.strip()[-300:]}")

    def stop(self, agents):
        for x in agents:
            x.process.terminate()
        for x in agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                x.process.wait(15)
            x.process.kill()
            self.live.remove(x.process)

    def backend(self, host):
        d = f"{self.dir}/nginx-{host}"
        os.makedirs(d)
        open(d + "/nginx.conf", "w").write(NGINX.format(d=d))
        self.start(host, ["nginx", "-c", d + "/nginx.conf", "-p", d], f"nginx-{host}")

    def agent(self, node, host=None, place=None, hcl="", workers=None, flags=()):
        """Starts an agent on host a, b, or at a place of the crowd; b is the issuer, the others join through it."""
        host = host or "c"
        ip, api = (IPS[host], API) if host in IPS else (self.crowd_ip(place), API + place)
        conf = f"{self.dir}/{node}-conf"
        os.makedirs(conf)
        open(conf + "/agent.hcl", "w").write(hcl)
        how = ["-issuer", self.dir + "/ca/issuer-1"] if host == "b" else ["-join", IPS["b"], "-token", self.token]
        cmd = [self.weft, "agent", "-node", node, "-data-dir", f"{self.dir}/{node}", "-bind", ip, "-http-port", api,
               "-workers", workers or self.workers, "-default-intention-policy", "allow", "-config-dir", conf, "-log-level", "warn",
               *([] if host in IPS else ["-dns-port", "-1"]), *how, *flags]  # the crowd shares one loopback
        return Agent(self, node, host, ip, api, self.start(host, cmd, node))

    def until(self, what, done, secs=60):
        end = time.time() + secs
        said = ""
        while time.time() < end:
            with contextlib.suppress(RuntimeError, ValueError):
                said = done()
                if said is True:
                    return
            time.sleep(0.2)
        logs = "".join(open(f"{self.dir}/{f}").read()[-300:] for f in sorted(os.listdir(self.dir)) if f in ("a.log", "b.log", "c1.log"))
        raise SystemExit(f"not within {secs} s: {what} (at the end: {said!r})\n{logs}")
