// Registers, watches and fails over with the unmodified npm client `consul`, its `watch` included.
//
// Usage: node watch.js MODULE FIRST SECOND: the module's directory, addresses of two agents of one mesh. The watch is held at the first.
// Prints what it saw, a line each; after `kill the second` it waits for the second's instance to go.
"use strict";

const assert = require("node:assert");
const [module_, firstAddress, secondAddress] = process.argv.slice(2);
const Consul = require(module_);

const PATIENCE_MS = 30000;
const at = (host) => new Consul({ host, port: 8500 });
const [first, second] = [at(firstAddress), at(secondAddress)];

/** Follows the passing instances of a service. */
class Follower {
  constructor(service) {
    this.seen = undefined;
    this.changes = 0;
    this.waiting = () => {};
    this.watch = first.watch({
      method: first.health.service,
      options: { service, passing: true, wait: "20s" },
      backoffFactor: 100,
      maxAttempts: 3,
    });
    this.watch.on("change", (nodes) => {
      this.changes += 1;
      this.seen = nodes.map((one) => one.Service.ID);
      this.waiting();
    });
    this.watch.on("error", (error) => {
      this.error = error;
      this.waiting();
    });
  }

  async wait(want) {
    const is = () => JSON.stringify(this.seen) === JSON.stringify(want);
    await new Promise((resolve, reject) => {
      const late = setTimeout(() => reject(new Error(`wanted ${want}, saw ${this.seen}`)), PATIENCE_MS);
      this.waiting = () => {
        if (this.error) reject(this.error);
        if (!is()) return;
        clearTimeout(late);
        resolve();
      };
      this.waiting();
    });
    console.log("saw", JSON.stringify(want));
  }
}

async function main() {
  const names = [await first.agent.self(), await second.agent.self()].map((self) => self.Config.NodeName);
  const members = await first.agent.members();
  assert.deepStrictEqual(members.map((one) => one.Name).sort(), names.slice().sort());
  assert.ok(await first.status.leader());

  const web = new Follower("web");
  await web.wait([]);
  const check = { ttl: "600s", status: "passing" };
  await first.agent.service.register({ name: "web", id: "web-1", port: 81, tags: ["v1"], meta: { version: "7" }, check });
  await web.wait(["web-1"]);
  await second.agent.service.register({ name: "web", id: "web-2", port: 82, tags: ["v2"], check });
  await web.wait(["web-1", "web-2"]);

  const mine = (await first.agent.service.list())["web-1"];
  assert.deepStrictEqual([mine.Service, mine.Port, mine.Tags, mine.Meta.version], ["web", 81, ["v1"], "7"]);
  assert.deepStrictEqual((await first.catalog.service.list()).web.sort(), ["v1", "v2"]);
  assert.deepStrictEqual(
    (await first.catalog.service.nodes("web")).map((one) => one.ServiceID),
    ["web-1", "web-2"],
  );
  assert.deepStrictEqual((await first.catalog.node.list()).map((one) => one.Node), names.slice().sort());
  assert.strictEqual((await first.health.checks("web")).length, 2);

  await second.agent.check.fail({ id: "service:web-2", note: "disk full" });
  await web.wait(["web-1"]);
  const state = await second.health.state("critical");
  assert.deepStrictEqual(state.map((one) => [one.CheckID, one.Output]), [["service:web-2", "disk full"]]);
  // Outputs stay on the agent that runs the check.
  const remote = await first.health.state("critical");
  assert.deepStrictEqual(remote.map((one) => [one.CheckID, one.Output]), [["service:web-2", ""]]);
  await second.agent.check.pass("service:web-2");
  await web.wait(["web-1", "web-2"]);
  await first.agent.maintenance({ enable: true, reason: "new disk" });
  await web.wait(["web-2"]);
  await first.agent.maintenance({ enable: false });
  await web.wait(["web-1", "web-2"]);

  await second.agent.check.register({ name: "memory", serviceid: "web-2", ttl: "600s" });
  await web.wait(["web-1"]);
  await second.agent.check.deregister("memory");
  await web.wait(["web-1", "web-2"]);

  console.log("kill the second");
  await web.wait(["web-1"]);
  await first.agent.service.deregister("web-1");
  await web.wait([]);
  assert.ok(web.changes < 40, `${web.changes} changes`);
  web.watch.end();
  console.log("done");
  process.exit(0);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
