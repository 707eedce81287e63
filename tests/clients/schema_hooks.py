"""Hooks of schemathesis for weft's API: waits are kept short, and a 5xx must be one that has a meaning.

`SCHEMATHESIS_HOOKS=schema_hooks schemathesis run … --checks no_surprise,…` reads them.
"""

import schemathesis

# Statuses from 500 on that are answers, not accidents: path prefix ('' for all), status, part of the text.
ANSWERS = [
    ("", 500, "No path to datacenter"),
    # Nobody is at the address that was generated.
    ("/v1/agent/join/", 500, ""),
    # The status is the answer: critical, or in maintenance.
    ("/v1/agent/health/service/", 503, ""),
    # Refused on purpose.
    ("", 501, "weft"),
]


@schemathesis.hook
def before_call(context, case, kwargs):
    """A blocking query may wait for minutes, as it should; here it waits for a moment."""
    query = case.query or {}
    if "index" in query or "hash" in query:
        case.query = {**query, "wait": "20ms"}


@schemathesis.check
def no_surprise(context, response, case):
    if response.status_code < 500:
        return
    path = case.path
    for prefix, status, text in ANSWERS:
        if response.status_code == status and path.startswith(prefix) and text in response.text:
            return
    raise AssertionError(f"{case.method} {path}: {response.status_code} {response.text[:200]}")


@schemathesis.check
def errors_are_text(context, response, case):
    """Clients of Consul show an error's body as it is: a plain text of a line or more, never JSON."""
    if response.status_code < 400 or case.method.upper() == "HEAD":
        return
    kind = (response.headers.get("content-type") or [""])[0]
    assert not kind.startswith("application/json") or case.path.startswith("/v1/agent/health/service/"), kind
    if response.status_code != 404:
        assert response.text.strip(), f"{case.method} {case.path}: {response.status_code} without a word"
