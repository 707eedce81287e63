"""A collector of OTLP over HTTP: decodes with the official messages and prints one JSON line per span and per point.

  collector.py HOST PORT MODE_FILE    prints `ready`, runs until it is killed

MODE_FILE says what becomes of a request: `take`, `busy` (503, come again in a second) or `hang` (no answer).
"""

import json
import pathlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


def attributes(of):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of}


def spans(request):
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield {
                    "signal": "span",
                    "resource": attributes(resource.resource.attributes),
                    "scope": scope.scope.name,
                    "trace": span.trace_id.hex(),
                    "span": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "state": span.trace_state,
                    "name": span.name,
                    "kind": span.kind,
                    "flags": span.flags,
                    "status": span.status.code,
                    "nanoseconds": span.end_time_unix_nano - span.start_time_unix_nano,
                    "age": time.time() - span.start_time_unix_nano / 1e9,
                    "attributes": attributes(span.attributes),
                }


def points(request):
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                data = getattr(metric, metric.WhichOneof("data"))
                for point in data.data_points:
                    yield {
                        "signal": "point",
                        "resource": attributes(resource.resource.attributes),
                        "name": metric.name,
                        "unit": metric.unit,
                        "kind": metric.WhichOneof("data"),
                        "temporality": getattr(data, "aggregation_temporality", 0),
                        "value": point.count if hasattr(point, "count") else getattr(point, point.WhichOneof("value")),
                        "sum": getattr(point, "sum", None),
                        "counts": list(getattr(point, "bucket_counts", [])),
                        "bounds": list(getattr(point, "explicit_bounds", [])),
                        "seconds": (point.time_unix_nano - point.start_time_unix_nano) / 1e9,
                        "attributes": attributes(point.attributes),
                    }


KINDS = {
    "/v1/traces": (ExportTraceServiceRequest, ExportTraceServiceResponse, spans),
    "/v1/metrics": (ExportMetricsServiceRequest, ExportMetricsServiceResponse, points),
}


PRINTING = threading.Lock()


def say(line):
    """Prints a line that no other thread's falls into: `print` writes its text and its end one after the other."""
    with PRINTING:
        print(json.dumps(line), flush=True)


class Collector(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        mode = MODE.read_text().strip()
        say({"signal": "request", "path": self.path, "mode": mode, "key": self.headers.get("x-key")})
        if mode == "hang":
            time.sleep(600)
        if mode == "busy":
            return self.answer(503, b"", {"Retry-After": "1"})
        if self.headers["Content-Type"] != "application/x-protobuf" or self.path not in KINDS:
            return self.answer(400, b"", {})
        request, response, lines = KINDS[self.path]
        for line in lines(request.FromString(body)):
            say(line)
        self.answer(200, response().SerializeToString(), {"Content-Type": "application/x-protobuf"})

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


host, port, mode = sys.argv[1:]
MODE = pathlib.Path(mode)
server = ThreadingHTTPServer((host, int(port)), Collector)
print("ready", flush=True)
server.serve_forever()
