"""gRPC without generated code: rpc.py serve PORT NAME, or rpc.py call PORT METHOD [TEXT]. Needs grpcio.

Every method answers with the server's name, the method and the text; what ends with `Hang` takes five seconds. At a server named
v2 what ends with `Tail` takes one, and what ends with `Fail` is UNAVAILABLE. A caller sets no deadline and prints the answer, or
the status.
"""

import sys
import time
from concurrent import futures

import grpc

BYTES = {"request_deserializer": bytes, "response_serializer": bytes}


class Server(grpc.GenericRpcHandler):
    def service(self, details):
        def answer(request, context):
            if NAME == "v2" and details.method.endswith("Fail"):
                context.abort(grpc.StatusCode.UNAVAILABLE, "not here")
            if details.method.endswith("Hang"):
                time.sleep(5)
            if NAME == "v2" and details.method.endswith("Tail"):
                time.sleep(1)
            return f"{NAME} {details.method} {request.decode()}".encode()

        return grpc.unary_unary_rpc_method_handler(answer, **BYTES)


def serve():
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[Server()])
    server.add_insecure_port(f"127.0.0.1:{PORT}")
    server.start()
    server.wait_for_termination()


def call(method, text=""):
    channel = grpc.insecure_channel(f"127.0.0.1:{PORT}", options=[("grpc.enable_http_proxy", 0)])
    try:
        print(channel.unary_unary(method)(text.encode()).decode())
    except grpc.RpcError as error:
        print(error.code().name, error.details())


PORT, NAME = int(sys.argv[2]), sys.argv[3]
if sys.argv[1] == "serve":
    serve()
else:
    call(*sys.argv[3:])
