"""Registers, watches and fails over with the unmodified PyPI client `py-consul`.

Usage: py_consul.py FIRST SECOND: addresses of two agents of one mesh. The watch is held at the first. Prints what it saw, a
line each; after `kill the second` it waits for the second's instance to go. Ends with code 0 if all was as it should.
"""

import sys
import threading
import time

import consul

PATIENCE = 30
first, second = (consul.Consul(host=address, port=8500) for address in sys.argv[1:3])


class Watch(threading.Thread):
    """Follows the passing instances of a service by blocking queries."""

    def __init__(self, client, service):
        super().__init__(daemon=True)
        self.client, self.service = client, service
        self.changed = threading.Condition()
        self.seen, self.queries, self.error = None, 0, None

    def run(self):
        index = None
        try:
            while True:
                index, nodes = self.client.health.service(self.service, passing=True, index=index, wait="20s")
                with self.changed:
                    self.queries += 1
                    self.seen = [(n["Node"]["Node"], n["Service"]["ID"], n["Service"]["Port"]) for n in nodes]
                    self.changed.notify_all()
        except Exception as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def wait(self, want):
        with self.changed:
            done = self.changed.wait_for(lambda: self.error or self.seen == want, PATIENCE)
        assert done and not self.error, f"wanted {want}, saw {self.seen}, {self.error!r}"
        print("saw", [instance for _, instance, _ in want], flush=True)


def keys_and_values(first, second):
    """The key-value store, which this mesh has turned on, from one agent to the other."""
    assert first.kv.put("app/one", "1", flags=7) is True
    assert first.kv.put("app/two", b"\x00\xff") is True
    index, one = first.kv.get("app/one")
    assert (one["Value"], one["Flags"], one["Key"]) == (b"1", 7, "app/one"), one
    deadline = time.monotonic() + 30
    while second.kv.get("app/", keys=True)[1] != ["app/one", "app/two"]:
        assert time.monotonic() < deadline, second.kv.get("app/", keys=True)
        time.sleep(0.05)
    assert second.kv.get("app/two")[1]["Value"] == b"\x00\xff"
    assert [entry["Key"] for entry in second.kv.get("app/", recurse=True)[1]] == ["app/one", "app/two"]
    assert second.kv.get("", keys=True, separator="/")[1] == ["app/"]
    # A wait ends with the change, also with a deletion.
    index, _ = second.kv.get("app/one")
    assert first.kv.delete("app/one") is True
    _, gone = second.kv.get("app/one", index=index, wait="30s")
    assert gone is None, gone
    for refused in (lambda: first.kv.put("app/one", "1", cas=0), lambda: first.kv.put("x" * 513, "1")):
        try:
            answer = refused()
        except consul.ConsulException:
            continue
        raise AssertionError(answer)
    assert first.kv.delete("app/", recurse=True) is True
    assert first.kv.get("app/", keys=True)[1] is None


def nodes_without_an_agent(first, second):
    """A node that no agent runs on, registered at the first and found at the second."""
    service = {"service": "db", "id": "db-1", "tags": ["primary"], "port": 5432}
    assert first.catalog.register("db-host", "192.0.2.77", service=service) is True
    deadline = time.monotonic() + PATIENCE
    while not second.health.service("db", passing=True)[1]:
        assert time.monotonic() < deadline, second.catalog.nodes()
        time.sleep(0.05)
    _, found = second.catalog.service("db")
    assert (found[0]["Node"], found[0]["Address"], found[0]["ServicePort"]) == ("db-host", "192.0.2.77", 5432), found
    check = {"name": "up", "checkid": "db-up", "status": "critical", "serviceid": "db-1"}
    assert first.catalog.register("db-host", "192.0.2.77", check=check) is True
    deadline = time.monotonic() + PATIENCE
    while second.health.service("db", passing=True)[1]:
        assert time.monotonic() < deadline, second.health.service("db")
        time.sleep(0.05)
    assert first.catalog.deregister("db-host", check_id="db-up") is True
    assert first.catalog.deregister("db-host") is True
    deadline = time.monotonic() + PATIENCE
    while "db-host" in [node["Node"] for node in second.catalog.nodes()[1]]:
        assert time.monotonic() < deadline, second.catalog.nodes()
        time.sleep(0.05)


def main():
    names = [first.agent.self()["Config"]["NodeName"], second.agent.self()["Config"]["NodeName"]]
    assert sorted(m["Name"] for m in first.agent.members()) == sorted(names)
    assert first.status.leader() and isinstance(first.status.peers(), list)
    assert first.catalog.datacenters() == ["dc1"]
    watch = Watch(first, "web")
    watch.start()
    watch.wait([])

    ttl = consul.Check.ttl("600s")
    meta = {"version": "7"}
    assert first.agent.service.register("web", service_id="web-1", port=81, tags=["v1", "eu"], check=ttl, meta=meta)
    assert second.agent.service.register("web", service_id="web-2", port=82, tags=["v2"], check=ttl)
    # A new TTL check is critical until it is told otherwise.
    assert watch.seen == []
    assert first.agent.check.ttl_pass("service:web-1", "it runs")
    watch.wait([(names[0], "web-1", 81)])
    both = [(names[0], "web-1", 81), (names[1], "web-2", 82)]
    assert second.agent.check.ttl_pass("service:web-2")
    watch.wait(both)

    # What was registered reads back in Consul's shapes.
    mine = first.agent.services()["web-1"]
    assert (mine["Service"], mine["Port"], mine["Tags"], mine["Meta"]) == ("web", 81, ["v1", "eu"], meta), mine
    assert first.agent.checks()["service:web-1"]["Output"] == "it runs"
    _, services = first.catalog.services()
    assert sorted(services["web"]) == ["eu", "v1", "v2"], services
    _, tagged = first.catalog.service("web", tag="v2")
    assert [one["ServiceID"] for one in tagged] == ["web-2"]
    _, nodes = first.catalog.nodes()
    assert [one["Node"] for one in nodes] == sorted(names)
    _, checks = first.health.checks("web")
    assert {one["CheckID"] for one in checks} == {"service:web-1", "service:web-2"}
    _, passing = first.health.state("passing")
    assert "serfHealth" in {one["CheckID"] for one in passing}
    _, of_node = first.health.node(names[1])
    assert "service:web-2" in {one["CheckID"] for one in of_node}

    # A query waits as long as it was told where nothing changes.
    index, _ = first.health.service("web", passing=True)
    begun = time.monotonic()
    same, _ = first.health.service("web", passing=True, index=index, wait="1s")
    assert same == index and time.monotonic() - begun >= 1.0, (same, index, time.monotonic() - begun)

    assert second.agent.check.ttl_fail("service:web-2", "disk full")
    watch.wait(both[:1])
    assert second.agent.check.ttl_warn("service:web-2")
    assert second.agent.check.ttl_pass("service:web-2")
    watch.wait(both)
    assert second.agent.service.maintenance("web-2", True, "new disk")
    watch.wait(both[:1])
    assert second.agent.service.maintenance("web-2", False)
    watch.wait(both)

    # The client makes False of a 404, and an exception of the refusal of what needs consensus.
    assert first.agent.check.ttl_pass("service:nobody") is False
    try:
        answer = first.session.create()
    except consul.ConsulException as error:
        assert "501" in str(error) and "needs consensus" in str(error), repr(error)
    else:
        raise AssertionError(f"a session was made: {answer}")

    keys_and_values(first, second)
    nodes_without_an_agent(first, second)

    print("kill the second", flush=True)
    watch.wait(both[:1])
    assert first.agent.service.deregister("web-1")
    watch.wait([])
    # Each state was one answer, or little more: it did not ask in a circle.
    assert watch.queries < 40, watch.queries
    print("done", flush=True)


main()
