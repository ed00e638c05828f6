"""A client without our stubs finds out by itself how to talk to a tenant's adapter."""

import asyncio

from loraplex_server.identity.api_keys import make_key
from tests.server.conftest import Shop
from tests.server.rig import running
from tests.sim.engine import answer
from tests.sim.stranger import in_own_process


async def test_a_conversation_by_reflection_alone(shop: Shop) -> None:
    digest = shop.publish("acme/orders", tag="prod").digest
    key, entry = make_key("app", "acme")
    async with running(shop, keys=entry) as rig:
        found = await asyncio.to_thread(in_own_process, f"127.0.0.1:{rig.app.port}", "acme/orders@prod", key)
    assert found["ours"] == [], "it must have learnt everything from the server"
    assert found["digests"] == [digest, digest]
    assert found["tokens"] == 8
    prompt: tuple[int, ...] = ()
    for turn in range(2):
        asked, answered = found["said"][2 * turn], found["said"][2 * turn + 1]
        prompt += tuple(ord(letter) for letter in asked["content"])
        tokens = [answer(f"acme/orders@{digest}", prompt, position) for position in range(4)]
        assert answered["content"] == "".join(f"{token} " for token in tokens)
        prompt += tuple(ord(letter) for letter in answered["content"])
