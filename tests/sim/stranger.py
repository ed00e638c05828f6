"""A gRPC client that has never seen our protos: it knows an address, an adapter's name, and gRPC reflection.

`python stranger.py HOST:PORT ADAPTER` finds the service that generates by asking the server, learns its messages from
there, holds a conversation of two turns, and prints it as JSON. A script of its own, so that nothing of ours can help.
"""

import json
import subprocess
import sys
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

TURNS = ("good morning", "and now?")


def find_method(channel: grpc.Channel, name: str) -> MethodDescriptor:
    """Look for a method of this name among all services that the server has."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    for service in database.get_services():
        found = pool.FindServiceByName(service).methods_by_name.get(name)
        if found is not None:
            return found
    raise LookupError(f"no service has a method {name}")


def converse(target: str, adapter: str, key: str = "") -> dict[str, Any]:
    """Say each of `TURNS`, with everything said before, and collect the answers."""
    with grpc.insecure_channel(target) as channel:
        method = find_method(channel, "Generate")
        request_class, answer_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        generate = channel.unary_stream(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=answer_class.FromString,
        )
        metadata = (("authorization", f"Bearer {key}"),) if key else ()
        said: list[dict[str, str]] = []
        digests, tokens = [], 0
        for turn in TURNS:
            said.append({"role": "user", "content": turn})
            request: Any = request_class(adapter=adapter)
            for one in said:
                request.chat.messages.add(**one)
            request.sampling.max_tokens = 4
            request.sampling.temperature = 0
            text = ""
            for message in generate(request, metadata=metadata, timeout=60):
                kind = message.WhichOneof(answer_class.DESCRIPTOR.oneofs[0].name)
                if kind == "header":
                    digests.append(message.header.adapter_digest)
                elif kind == "delta":
                    text += message.delta.text
                else:
                    tokens += message.end.usage.completion_tokens
            said.append({"role": "assistant", "content": text})
    return {"said": said, "digests": digests, "tokens": tokens, "method": method.full_name}


def in_own_process(target: str, adapter: str, key: str = "") -> dict[str, Any]:
    """Have a process that cannot see this project's folders hold the conversation."""
    command = [sys.executable, "-I", __file__, target, adapter, *([key] if key else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    found = converse(*sys.argv[1:])
    found["ours"] = sorted(name for name in sys.modules if name.startswith("loraplex"))
    print(json.dumps(found))
