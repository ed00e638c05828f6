"""Damaged, random and absurd messages to every method."""

import asyncio
import random
from collections import Counter
from typing import Any

import grpc

from loraplex_protos.v1 import adapters_pb2, generation_pb2
from loraplex_server.identity.api_keys import make_key
from loraplex_server.identity.principals import RIGHTS
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running


async def hostile_messages(shop: Shop, *, count: int, seed: int) -> Counter[str]:
    """Send damaged, random and absurd messages to every method; returns how often each status came."""
    rng, statuses = random.Random(seed), Counter[str]()
    shop.publish("acme/orders")
    key, entry = make_key("app", "acme", admin=True)
    async with (
        running(shop, keys=entry) as rig,
        grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.port}") as channel,
    ):
        methods = {name: _described(name) for name in RIGHTS}
        calls = {
            name: (channel.unary_stream if kind.server_streaming else channel.unary_unary)(name)
            for name, kind in methods.items()
        }

        async def one() -> None:
            name = rng.choice(list(methods))
            metadata = [("authorization", f"Bearer {key}")] if rng.random() < 0.9 else []
            if rng.random() < 0.2:
                metadata.append((f"x-{rng.randrange(99)}-bin", rng.randbytes(rng.randrange(200))))
            try:
                answered = calls[name](_message(rng), metadata=tuple(metadata), timeout=5)
                if methods[name].server_streaming:
                    async for _ in answered:
                        pass
                else:
                    await answered
                statuses["OK"] += 1
            except grpc.RpcError as failed:
                statuses[failed.code().name] += 1  # type: ignore[attr-defined]

        for _ in range(0, count, 100):
            await asyncio.gather(*(one() for _ in range(min(100, count))))
        async with rig.client(key) as client:  # it serves as before
            await client.generate("x", adapter="acme/orders", sampling=FOUR)
    return statuses


def _described(method: str) -> Any:
    _, service, name = method.split("/")
    for file in (adapters_pb2.DESCRIPTOR, generation_pb2.DESCRIPTOR):
        found = file.services_by_name.get(service.rpartition(".")[2])
        if found is not None:
            return found.methods_by_name[name]
    raise KeyError(method)


def _message(rng: random.Random) -> bytes:
    """Random bytes, or a request with absurd values, whole or damaged."""
    if rng.random() < 0.3:
        return rng.randbytes(rng.randrange(300))
    request = generation_pb2.GenerateRequest(
        adapter=rng.choice(
            [
                "",
                "acme/orders",
                "acme/orders@prod",
                "../x",
                "a/b/c",
                "@",
                "acme/" + "x" * 5000,
                "ä/ö",
                "\x00",
                "acme/orders@prod=1,canary=1",
                "acme/orders@prod=0",
                "acme/orders@a=1,a=1",
                "acme/orders@" + "a=1," * 999,
            ]
        ),
        session=rng.choice(["", "s", "\x00" * 100, "x" * 200]),
        request_id=rng.choice(["", "ok", "\n", "x" * 200]),
        priority=rng.choice([0, -(2**31), 2**31 - 1]),
    )
    form = rng.randrange(4)
    if form == 0:
        request.text = rng.choice(["", "x", "\U0001f600" * 50, "x" * 10_000])
    elif form == 1:
        request.token_ids.ids.extend(rng.choice([[], [0], [999], [2**32 - 1], [1] * 500]))
    elif form == 2:
        request.chat.messages.add(role=rng.choice(["user", "root", ""]), content=rng.choice(["", "x"]))
    sampling = request.sampling
    for field_name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"):
        if rng.random() < 0.3:
            setattr(sampling, field_name, rng.choice([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf")]))
    if rng.random() < 0.5:
        sampling.max_tokens = rng.choice([0, 1, 3, 2**32 - 1])
    for field_name in ("n", "logprobs", "min_tokens"):
        if rng.random() < 0.2:
            setattr(sampling, field_name, rng.choice([0, 1, 2, 17, 2**32 - 1]))
    if rng.random() < 0.2:
        _absurd_form(sampling.structured_output, rng)
    sampling.stop.extend(rng.choice([[], ["x"], [""], ["y"] * 40]))
    body = bytearray(request.SerializeToString())
    for _ in range(rng.choice([0, 0, 1, 3])):
        if body:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return bytes(body[: rng.randrange(len(body) + 1)] if rng.random() < 0.1 else body)


def _absurd_form(form: generation_pb2.StructuredOutput, rng: random.Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        form.json_schema = rng.choice(
            ["", "{}", "[]", '{"type":' * 500, '{"$ref":"#"}', '{"type":"object"}', "\x00"]
        )
    elif kind == 1:
        form.regex = rng.choice(["", "(", "(a*)*b", "a{1,99999}", "(" * 5000, "\\"])
    elif kind == 2:
        form.grammar = rng.choice(["", "root ::= root", 'root ::= "a" root | ""', "x" * 70_000])
    elif kind == 3:
        form.choice.texts.extend(rng.choice([[], [""], ["a", "a"], ["yes", "no"], ["x" * 9000], ["c"] * 300]))
    else:
        form.SetInParent()
