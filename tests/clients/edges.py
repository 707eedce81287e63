"""Unmodified clients and servers through the mesh: grpcio, websockets, http.server.

  edges.py serve HOST HTTP_PORT GRPC_PORT WS_PORT   apps; prints `ready`, runs until it is killed
  edges.py call GRPC_ADDR WS_ADDR                   clients; prints a line for each thing shown, then `done`
  edges.py entries GRPC_ADDR                        what entries make of calls of gRPC; the same
  edges.py refused GRPC_ADDR                        no call at all may be under way; the same
  edges.py ws WS_ADDR [HTTP]                        a WebSocket, at an app that it reaches by this version of HTTP; the same
"""

import asyncio
import hashlib
import http.server
import sys
import threading
import time
from concurrent import futures

import grpc
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve

BYTES = dict(request_deserializer=bytes, response_serializer=bytes)


class Upload(http.server.BaseHTTPRequestHandler):
    """Answers with the SHA-256 of what it is sent; asks for an awaited body itself, unless its path says no."""

    protocol_version = "HTTP/1.1"

    def handle_expect_100(self):
        if self.path == "/refused":
            self.send_response(403)  # after a 417 curl asks again without Expect
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return False
        return super().handle_expect_100()

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def do_PUT(self):
        text = hashlib.sha256(self.body()).hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def handler(_, details):
    def unary(request, context):
        names = dict(context.invocation_metadata())
        context.set_trailing_metadata((("seen", names.get("asked", "")),))
        return request.upper()

    def chat(requests, _):
        for request in requests:
            yield request.upper()

    def count(request, _):
        for number in range(int(request)):
            yield str(number).encode()

    def hang(_, context):
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(20)
        Servicer.cancelled.set()
        return b""

    def was_cancelled(_, __):
        return b"yes" if Servicer.cancelled.wait(5) else b"no"

    def refuse(_, context):
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not like this")

    def pushback(request, context):
        # The first call of each name is refused, with this word on retries.
        name, millis = request.decode().split()
        Servicer.calls[name] = Servicer.calls.get(name, 0) + 1
        if Servicer.calls[name] == 1:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", millis),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return str(Servicer.calls[name]).encode()

    name = details.method.rsplit("/", 1)[-1]
    unaries = dict(unary=unary, hang=hang, was_cancelled=was_cancelled, refuse=refuse, pushback=pushback)
    if name in unaries:
        return grpc.unary_unary_rpc_method_handler(unaries[name], **BYTES)
    if name == "chat":
        return grpc.stream_stream_rpc_method_handler(chat, **BYTES)
    if name == "count":
        return grpc.unary_stream_rpc_method_handler(count, **BYTES)
    return None


class Servicer(grpc.GenericRpcHandler):
    cancelled = threading.Event()
    calls = {}

    def service(self, handler_call_details):
        return handler(self, handler_call_details)


async def echo(socket):
    async for message in socket:
        if message == "close":
            await socket.close(4001, "asked to")
            return
        await socket.send(message)


async def serve_all(host, http_port, grpc_port, ws_port):
    uploads = http.server.ThreadingHTTPServer((host, http_port), Upload)
    threading.Thread(target=uploads.serve_forever, daemon=True).start()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((Servicer(),))
    assert server.add_insecure_port(f"{host}:{grpc_port}")
    server.start()
    async with serve(echo, host, ws_port, max_size=1 << 24):
        print("ready", flush=True)
        await asyncio.Future()


def expect(code, call):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()} {error.details()}, not {code}"
        return error
    raise AssertionError(f"no {code}")


def say(what):
    print(what, flush=True)


def call_grpc(addr):
    channel = grpc.insecure_channel(addr, options=[("grpc.enable_http_proxy", 0)])
    method = lambda kind, name: getattr(channel, kind)(f"/t.Test/{name}")
    unary = method("unary_unary", "unary")
    answer, call = unary.with_call(b"hello", metadata=(("asked", "this"),), timeout=10)
    assert answer == b"HELLO" and dict(call.trailing_metadata())["seen"] == "this"
    assert unary(b"x" * (1 << 20), timeout=10) == b"X" * (1 << 20)
    say("grpc unary")

    # Each message is sent after the answer to the one before has come.
    come = [threading.Semaphore(0) for _ in range(5)]

    def messages():
        for number in range(5):
            if number:
                assert come[number - 1].acquire(timeout=10)
            yield f"m{number}".encode()

    for number, answer in enumerate(method("stream_stream", "chat")(messages(), timeout=20)):
        assert answer == f"M{number}".encode()
        come[number].release()
    assert number == 4
    assert len(list(method("unary_stream", "count")(b"5000", timeout=20))) == 5000
    say("grpc streams")

    began = time.monotonic()
    expect(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: method("unary_unary", "hang")(b"", timeout=0.5))
    assert time.monotonic() - began < 5
    # The server hears of it as well: the deadline, or the reset that follows it.
    assert method("unary_unary", "was_cancelled")(b"", timeout=10) == b"yes"
    say("grpc deadline")

    hanging = method("unary_unary", "hang").future(b"", timeout=20)
    time.sleep(0.1)
    hanging.cancel()
    expect(grpc.StatusCode.CANCELLED, lambda: hanging.exception() and hanging.result()) if not hanging.cancelled() else None
    say("grpc cancellation")

    error = expect(grpc.StatusCode.FAILED_PRECONDITION, lambda: method("unary_unary", "refuse")(b"", timeout=10))
    assert error.details() == "not like this"
    expect(grpc.StatusCode.UNIMPLEMENTED, lambda: method("unary_unary", "nothing")(b"", timeout=10))
    say("grpc trailers-only")

    # The route of the test retries UNAVAILABLE. grpcio's own retries are off, so that what comes is the mesh's.
    channel = grpc.insecure_channel(addr, options=[("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)])
    pushback = channel.unary_unary("/t.Test/pushback")
    began = time.monotonic()
    assert pushback(b"later 400", timeout=10) == b"2"
    assert time.monotonic() - began >= 0.4
    expect(grpc.StatusCode.UNAVAILABLE, lambda: pushback(b"never -1", timeout=10))
    assert pushback(b"never 0", timeout=10) == b"2", "it was asked again though it had said no"
    say("grpc pushback")


def call_by_entries(addr):
    """No call here has a deadline of its own: whatever ends one is the mesh's."""
    channel = grpc.insecure_channel(addr, options=[("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)])
    method = lambda name: channel.unary_unary(name)
    answer, call = method("/t.Routed/unary").with_call(b"hello")
    assert answer == b"HELLO" and dict(call.trailing_metadata())["seen"] == "by prefix"
    _, call = method("/t.Test/unary").with_call(b"hello")
    assert dict(call.trailing_metadata())["seen"] == "", "the route of another prefix"
    say("grpc route")

    error = expect(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: method("/t.Broken/unary")(b"hello"))
    assert "fault" in error.details(), error.details()
    say("grpc fault")

    began = time.monotonic()
    error = expect(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: method("/t.Slow/hang")(b""))
    assert 0.4 <= time.monotonic() - began < 5, error.details()
    # The app hears of it: what is left of the time goes along.
    assert method("/t.Test/was_cancelled")(b"") == b"yes"
    say("grpc timeout")

    # One call in ten seconds, once the entry has come to the app's agent.
    for _ in range(100):
        try:
            assert method("/t.Rated/unary")(b"hello") == b"HELLO"
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
            break
        time.sleep(0.1)
    else:
        raise AssertionError("no call is over the rate")
    say("grpc rate")


def call_refused(addr):
    channel = grpc.insecure_channel(addr, options=[("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)])
    began = time.monotonic()
    error = expect(grpc.StatusCode.UNAVAILABLE, lambda: channel.unary_unary("/t.Test/unary")(b"hello"))
    assert error.details() == "overflow", error.details()
    assert ("x-weft-overflow", "requests") in [tuple(one) for one in error.initial_metadata() or error.trailing_metadata()]
    assert time.monotonic() - began < 2
    say("grpc limit")


async def call_ws(addr, over=None):
    async with connect(f"ws://{addr}/chat", max_size=1 << 24, proxy=None) as socket:
        assert socket.response.headers.get("x-over") == over, socket.response.headers
        for message in ("text", b"bytes", "x" * 70_000, b"y" * (1 << 22)):
            await socket.send(message)
            assert await socket.recv() == message
        assert await (await socket.ping()) >= 0
        await socket.send("close")
        try:
            await socket.recv()
            raise AssertionError("no close")
        except websockets.ConnectionClosed as closed:
            assert (closed.rcvd.code, closed.rcvd.reason) == (4001, "asked to")
    say("websocket")


if sys.argv[1] == "serve":
    asyncio.run(serve_all(sys.argv[2], *map(int, sys.argv[3:6])))
elif sys.argv[1] == "entries":
    call_by_entries(sys.argv[2])
    say("done")
elif sys.argv[1] == "refused":
    call_refused(sys.argv[2])
    say("done")
elif sys.argv[1] == "ws":
    asyncio.run(call_ws(*sys.argv[2:]))
    say("done")
else:
    call_grpc(sys.argv[2])
    asyncio.run(call_ws(sys.argv[3]))
    say("done")
