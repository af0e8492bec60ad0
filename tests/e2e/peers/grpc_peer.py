"""A gRPC server and client, for tests/e2e/upgrades.rs: messages are plain bytes, so nothing has to be generated.

    grpc_peer.py serve
    grpc_peer.py client HOST:PORT KEY       calls all four kinds, and one that fails
"""

import sys
from concurrent import futures

import grpc


def unary(request, context):
    context.set_trailing_metadata((("x-trailer", "after"),))
    names = sorted(name for name, _ in context.invocation_metadata() if "api" in name or "tollgate" in name)
    return request + b" " + ",".join(names).encode()


def from_server(request, context):
    for n in range(3):
        yield request + str(n).encode()


def to_server(requests, context):
    return b"".join(requests)


def both_ways(requests, context):
    for request in requests:
        yield request.upper()


def failing(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")


def serve():
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "FromServer": grpc.unary_stream_rpc_method_handler(from_server),
        "ToServer": grpc.stream_unary_rpc_method_handler(to_server),
        "BothWays": grpc.stream_stream_rpc_method_handler(both_ways),
        "Failing": grpc.unary_unary_rpc_method_handler(failing),
    }
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tests.Peer", handlers),))
    print("port", server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


def client(address, key):
    known = (("x-api-key", key),)
    with grpc.insecure_channel(address) as channel:
        def call(kind, name, message, metadata=known):
            return getattr(channel, kind)("/tests.Peer/" + name)(message, metadata=metadata, timeout=20)

        reply, details = channel.unary_unary("/tests.Peer/Unary").with_call(b"hello", metadata=known, timeout=20)
        print("unary", reply.decode(), dict(details.trailing_metadata()).get("x-trailer"), flush=True)
        print("from server", b",".join(call("unary_stream", "FromServer", b"n")).decode(), flush=True)
        print("to server", len(call("stream_unary", "ToServer", iter([b"x" * 100_000] * 10))), flush=True)
        print("both ways", b",".join(call("stream_stream", "BothWays", iter([b"a", b"b"]))).decode(), flush=True)
        for name, metadata in [("Failing", known), ("Unary", ())]:
            try:
                call("unary_unary", name, b"x", metadata)
            except grpc.RpcError as error:
                print("error", error.code().name, flush=True)


serve() if sys.argv[1] == "serve" else client(*sys.argv[2:4])
