"""Many tenants, few slots: does a reply ever carry another adapter's tokens?"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

from loraplex_client import AsyncClient, LoraplexError, TokenIds
from loraplex_registry.refs import AdapterRef
from tests.registry.builders import make_adapter
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running
from tests.sim.engine import answer

POLICY_OF_ONE = """
[[rules]]
scope = "{tenant}/**"
keys = [{{ path = "acme.pub" }}]
"""


@dataclass
class Crossing:
    """What `crossing` saw: replies, those crossed, errors by reason, loads, and whether the metrics agree."""

    replies: int = 0
    crossed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    loads: int = 0
    accounted: bool = False


def many_tenants(shop: Shop, count: int) -> list[str]:
    """Publish one adapter for each of so many tenants; returns their names."""
    names = [f"t{number:03}" for number in range(count)]
    shop.policy.write_text(
        'version = 1\ndefault = "deny"\n' + "".join(POLICY_OF_ONE.format(tenant=name) for name in names)
    )
    for number, name in enumerate(names):
        directory = make_adapter(shop.root / f"a-{name}", rank=4, seed=number)
        shop.registry.publish(directory, AdapterRef(name, "mine"), shop.signers["acme"], shop.base)
    return names


async def crossing(shop: Shop, *, tenants: int, replies: int, seed: int) -> Crossing:
    """Many tenants share few slots: every reply must be the asked adapter's own."""
    rng, found = random.Random(seed), Crossing()
    names = many_tenants(shop, tenants)
    async with running(shop, adapters={"slots": 4}, limits={"tenant_requests_max": 10_000}) as rig:
        left = iter(range(replies))

        async def caller(client: AsyncClient) -> None:
            for _ in left:
                name, prompt = rng.choice(names), (rng.randrange(1000), rng.randrange(1000))
                try:
                    done = await client.generate(
                        TokenIds(prompt), adapter=f"{name}/mine", sampling=FOUR, timeout_s=60
                    )
                except LoraplexError as error:
                    found.errors[error.code or type(error).__name__] += 1
                    continue
                found.replies += 1
                wanted = tuple(answer(done.header.adapter, prompt, position) for position in range(4))
                right = done.header.adapter.startswith(f"{name}/mine@") and done.token_ids == wanted
                found.crossed += not right

        async with rig.client() as client:
            await asyncio.gather(*(caller(client) for _ in range(32)))
        found.loads = len(rig.engine.slot_ids_seen)
        found.accounted = rig.accounts_for(found.replies + sum(found.errors.values()))
        await rig.app.residency.check()
    return found
