"""What weft is to reach beside its peers, and whether a run reached it.  Pure: summary in, table out.

A goal is a list of conditions, all of which must hold.  A condition is (peer | None, operator, bound): a ratio of weft to
that peer, or with None weft's own figure.  `best` stands for the best peer that was measured.

A goal in weft's own figure was set on a machine on which the peers reached the figures in `RECORDED`.  On a slower or faster
one it says little; so it is also shown as the ratio to the peer that it was then (`as a ratio`).

`run by run` is the median of the ratios of the repeats, with the least and the most: where the machine drifts, figures of
one repeat are nearer to each other than the medians of all."""
import statistics



class Row:
    def __init__(self, work, test, metric, unit, must, aim=(), peers=None, less=False, show="{:.0f}", over=None, ratio=()):
        self.work, self.test, self.metric, self.unit = work, test, metric, unit
        self.must, self.aim = must, aim
        self.peers, self.less, self.show, self.over, self.ratio = peers, less, show, over, ratio


L7 = ["haproxy-http", "nginx-http", "envoy-h2", "envoy-h3"]
L4 = ["nginx-stream", "haproxy-tcp", "envoy-tcp"]
BULK = ["envoy-tcp", "envoy-h2", "envoy-h3", "haproxy-tcp", "nginx-stream"]
HA, EH2, ETCP, NGS = "haproxy-http", "envoy-h2", "envoy-tcp", "nginx-stream"
# What the goals' own figures were measured beside: (peer, its figure then).
RECORDED = {"http_c1": (HA, 0.14), "http_c64": (HA, 0.029), "bulk_1": (ETCP, 8.5), "bulk_cpu": (ETCP, 1.56), "idle_mem": (HA, 16)}


def as_ratio(key, sign, bound):
    peer, then = RECORDED[key]
    return [(peer, sign, round(bound / then, 2))]


ROWS = [
    Row("HTTP/1.1, 64 connections", "http_c64", "rps", "req/s", [(HA, ">=", 1.0), (EH2, ">=", 2.5)], [(HA, ">=", 1.2)], L7),
    Row("HTTP/1.1, 256 connections", "http_c256", "rps", "req/s", [(HA, ">=", 1.0)], [(HA, ">=", 1.15)], L7),
    Row("HTTP/1.1, 1 connection: p50 over direct", "http_c1", "p50_ms", "ms", [(None, "<=", 0.12)], [(None, "<=", 0.09)], L7,
        less=True, show="{:.3f}", over="direct", ratio=as_ratio("http_c1", "<=", 0.12)),
    Row("CPU of both proxies per 1,000 requests at 64", "http_c64", "cpu_ms_per_req", "s", [(None, "<=", 0.027)],
        [(None, "<=", 0.022)], L7, less=True, show="{:.4f}",
        ratio=as_ratio("http_c64", "<=", 0.027)),
    Row("HTTP/2, h2load -c10 -m32", "h2_c10_m32", "rps", "req/s", [(EH2, ">=", 2.2)], [(HA, ">=", 1.0)], [HA, EH2, "envoy-h3"]),
    Row("TCP keep-alive requests, 64 connections", "l4_c64", "rps", "req/s", [(NGS, ">=", 1.3)], [(NGS, ">=", 1.5)], L4),
    Row("new TCP connections", "conn_l4", "conn_s", "/s", [(EH2, ">=", 1.4)], [(EH2, ">=", 2.0)], [EH2, ETCP, "haproxy-tcp", NGS]),
    Row("bulk TCP, one stream, MTU 1500", "bulk_1", "gbit_s", "Gbit/s", [(None, ">=", 5.7)], [(None, ">=", 8.5)], BULK, show="{:.2f}",
        ratio=as_ratio("bulk_1", ">=", 5.7)),
    Row("the same: CPU of both proxies", "bulk_1", "cpu_s_per_gib", "s/GiB", [(None, "<=", 2.4)], [], BULK, less=True, show="{:.2f}",
        ratio=as_ratio("bulk_cpu", "<=", 2.4)),
    Row("bulk TCP, one stream, MTU 9000", "bulk9000_1", "gbit_s", "Gbit/s", [(ETCP, ">", 1.0)], [(None, ">=", 9.8)],
        [ETCP, EH2, "haproxy-tcp", NGS], show="{:.2f}"),
    Row("idle RSS, the larger side", "idle_mem", ("rss_kib_a", "rss_kib_b"), "MiB", [(None, "<=", 20)], [(None, "<=", 15)],
        L7 + L4, less=True, show="{:.1f}", ratio=as_ratio("idle_mem", "<=", 20)),
    Row("1,000 idle TCP connections, the larger side", "idle_l4_conns", ("kib_per_conn_a", "kib_per_conn_b"), "KiB each",
        [(None, "<=", 6)], [(None, "<=", 4)], L4 + [EH2], less=True, show="{:.1f}"),
    Row("1,000 idle HTTP connections, the larger side", "idle_http_conns", ("kib_per_conn_a", "kib_per_conn_b"), "KiB each",
        [(None, "<=", 6)], [(None, "<=", 4)], L7, less=True, show="{:.1f}"),
    Row("10,000 idle TCP connections, the larger side", "idle10k_l4", ("kib_per_conn_a", "kib_per_conn_b"), "KiB each",
        [(None, "<=", 6)], [(None, "<=", 4)], [EH2], less=True, show="{:.1f}"),
    Row("10,000 idle HTTP connections, the larger side", "idle10k_http", ("kib_per_conn_a", "kib_per_conn_b"), "KiB each",
        [(None, "<=", 6)], [(None, "<=", 4)], [EH2], less=True, show="{:.1f}"),
    Row("p99 at half of its own maximum rate, open loop", "open_half", "p99_ms", "ms", [("best", "<", 1.0)], [], L7, less=True, show="{:.3f}"),
    Row("1 % loss, 64 connections: p99", "loss_small_c64", "p99_ms", "ms", [(EH2, "<=", 0.5)], [], [EH2, HA], less=True, show="{:.1f}"),
    Row("the same: rate", "loss_small_c64", "rps", "req/s", [], [], [EH2, HA]),
    Row("the same, 16 KiB responses: p99", "loss_body_c64", "p99_ms", "ms", [(EH2, "<=", 0.5)], [], [EH2, HA], less=True, show="{:.1f}"),
    Row("the same, 16 KiB responses: goodput", "loss_body_c64", "goodput_mbit_s", "Mbit/s", [], [], [EH2, HA]),
    Row("1 % loss, constant 1,000 req/s: p99", "loss_open_c64", "p99_ms", "ms", [], [], [EH2, HA], less=True, show="{:.1f}"),
]
NAMES = {"haproxy-http": "HAProxy", "nginx-http": "nginx", "envoy-h2": "Envoy h2", "envoy-h3": "Envoy h3", "nginx-stream": "nginx stream",
         "haproxy-tcp": "HAProxy tcp", "envoy-tcp": "Envoy tcp", "best": "the best peer"}
SIGNS = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, "<": lambda a, b: a < b}


def figure(index, row, peer):
    """The median of a row for a peer; of a pair of metrics the larger."""
    entry = index.get((peer, row.test), {})
    metrics = row.metric if isinstance(row.metric, tuple) else (row.metric,)
    values = [entry[m]["median"] for m in metrics if m in entry]
    if not values:
        return None
    value = max(values) / (1024 if row.unit == "MiB" else 1)
    if row.over:                       # what comes on top of another peer's figure
        base = figure(index, Row("", row.test, row.metric, "", []), row.over)
        return None if base is None else value - base
    return value


def by_repeat(rows, row, peer):
    """{repeat: figure} of a row for a peer; what was disturbed or failed is left out."""
    metrics = row.metric if isinstance(row.metric, tuple) else (row.metric,)
    found = {}
    for r in rows:
        values = [r[m] for m in metrics if isinstance(r.get(m), (int, float))]
        if (r.get("peer"), r.get("test")) == (peer, row.test) and values and not (r.get("noisy") or r.get("errors")):
            found[r["rep"]] = max(values)
    if row.over:
        base = by_repeat(rows, Row("", row.test, row.metric, "", []), row.over)
        return {rep: value - base[rep] for rep, value in found.items() if rep in base}
    return found


def paired(rows, row, peer):
    """(median, least, most) of weft's ratio to a peer in each repeat; None with fewer than two repeats."""
    ours, theirs = by_repeat(rows, row, "weft"), by_repeat(rows, row, peer)
    ratios = [ours[rep] / theirs[rep] for rep in ours if theirs.get(rep, 0) > 0]
    return (statistics.median(ratios), min(ratios), max(ratios)) if len(ratios) > 1 else None


def spread(index, row, peer):
    entry = index.get((peer, row.test), {}).get(row.metric if isinstance(row.metric, str) else row.metric[0])
    return entry and [entry["min"], entry["max"]]


def holds(conditions, ours, peers, best):
    """True, False, or None when something was not measured."""
    if ours is None or not conditions:
        return None
    answers = []
    for peer, sign, bound in conditions:
        theirs = 1.0 if peer is None else peers.get(best if peer == "best" else peer)
        if not theirs:
            return None
        answers.append(SIGNS[sign](ours / theirs, bound))
    return all(answers)


def words(row, conditions):
    parts = []
    for peer, sign, bound in conditions:
        sign = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}[sign]
        parts.append(f"{sign} {bound:g} {row.unit}" if peer is None else f"{sign} {bound:g}x {NAMES[peer]}")
    return ", ".join(parts) or "–"


def verdicts(summary, runs=()):
    """One dict per row that was measured, losses as well as wins; `runs`: each run by itself."""
    index = {(e["peer"], e["test"]): e for e in summary}
    out = []
    for row in ROWS:
        ours = figure(index, row, "weft")
        peers = {p: v for p in row.peers if (v := figure(index, row, p)) is not None}
        if ours is None and not peers:
            continue
        order = sorted(peers, key=lambda p: peers[p], reverse=not row.less)
        best = order[0] if order else None
        named = [p for p, _, _ in list(row.must) + list(row.aim) + list(row.ratio) if p and p != "best"]
        ratios = {p: ours / peers[p] for p in dict.fromkeys(named + ([best] if best else [])) if ours is not None and peers.get(p)}
        pairs = {p: found for p in ratios if (found := paired(runs, row, p))}
        out.append(dict(pairs=pairs, work=row.work, unit=row.unit, test=row.test, less_is_better=row.less, weft=ours, weft_spread=spread(index, row, "weft"),
                        runs=index.get(("weft", row.test), {}).get("n"), peers=peers, best=best, ratios=ratios,
                        must=words(row, row.must), must_reached=holds(row.must, ours, peers, best),
                        as_ratio=words(row, row.ratio), as_ratio_reached=holds(row.ratio, ours, peers, best),
                        aim=words(row, row.aim), aim_reached=holds(row.aim, ours, peers, best), show=row.show))
    return out


def markdown(head, rows):
    widths = [max(len(r[i]) for r in [head] + rows) for i in range(len(head))]
    line = lambda r: "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths)) + " |"
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|"] + [line(r) for r in rows])


def page(summary, meta, runs=()):
    """The table of goals, every peer's figures, and what was measured on what."""
    say = {True: "yes", False: "NO", None: "–"}
    rows, others = [], []
    for v in verdicts(summary, runs):
        show = lambda x: "–" if x is None else v["show"].format(x)
        best = f"{show(v['peers'][v['best']])} {NAMES[v['best']]}" if v["best"] else "–"
        ratios = ", ".join(f"{r:.2f}x {NAMES[p]}" for p, r in v["ratios"].items()) or "–"
        pairs = ", ".join(f"{m:.2f}x {NAMES[p]} ({least:.2f}-{most:.2f})" for p, (m, least, most) in v["pairs"].items()) or "–"
        rows.append([f"{v['work']} ({v['unit']})", show(v["weft"]), best, ratios, pairs, v["must"], say[v["must_reached"]], v["as_ratio"], say[v["as_ratio_reached"]], v["aim"], say[v["aim_reached"]]])
        others.append([f"{v['work']} ({v['unit']})", ", ".join(f"{NAMES[p]} {show(x)}" for p, x in v["peers"].items()) or "–"])
    head = ["work", "weft", "best peer", "weft to peer", "run by run", "must reach", "reached", "as a ratio", "reached", "aim", "reached"]
    failed = [f"  {e['peer']} {e['test']}: {e['failed'][-1][:160]}" for e in summary if "failed" in e]
    noisy = sorted({f"{e['peer']} {e['test']}" for e in summary if e.get("all_noisy")})
    lost = [f"{e['peer']} {e['percent']['median']:.2f} %" for e in summary if e["test"] == "loss_packets" and "percent" in e]
    versions = ", ".join(f"{p} {v}" for p, v in meta["versions"].items() if v)
    parts = [markdown(head, rows), "Every peer:\n" + markdown(["work", "peers"], others),
             f"commit {meta['commit'][:12]}{' with changes' if meta['uncommitted'] else ''}, profile {meta['weft_profile']}; {meta['started']}; "
             f"{meta.get('cpu_model', meta['machine'])}, {meta['cpus']} CPUs, Linux {meta['kernel']}\n{versions}\n"
             f"medians of {max([e['n'] for e in summary], default=0)} runs or fewer; disturbed runs are left out where there is another"]
    if lost:
        parts.append("packets lost under `loss`: " + ", ".join(lost))
    if noisy:
        parts.append("disturbed in every run: " + ", ".join(noisy))
    if failed:
        parts.append("failed:\n" + "\n".join(failed))
    return "\n" + "\n\n".join(parts)
