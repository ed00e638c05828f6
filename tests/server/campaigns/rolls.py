"""A tag moves from version to version under load: does a call fail, or name a version that was not tagged then?"""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from loraplex_client import LoraplexError, TokenIds
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running
from tests.sim.engine import answer

CALLERS = 8


@dataclass
class Rolls:
    """What the callers of a moving tag saw.

    Attributes:
        untagged: answers of a version that was not the tag's at any moment of the call.
        wrong: answers whose tokens are not those of the version they name.
        seen: versions that answered at all.
        accounted: whether the metrics say the same of how the calls ended.
    """

    rolls: int = 0
    replies: int = 0
    untagged: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    accounted: bool = False


@dataclass
class _Tagged:
    """When a version may have been the tag's: from before it was pushed to after the next one was."""

    since: float
    until: float = float("inf")


async def rolls(shop: Shop, *, count: int, pause_s: float, seed: int) -> Rolls:
    """Publish so many versions of an adapter under one tag while callers ask for it; two slots, so all evict."""
    rng, found = random.Random(seed), Rolls()
    history: dict[str, _Tagged] = {}

    def publish(number: int) -> None:
        before = time.monotonic()
        published = shop.publish("acme/moving", seed=number, tag="prod")
        after = time.monotonic()
        for tagged in history.values():
            tagged.until = min(tagged.until, after)
        history[published.digest] = _Tagged(before)

    publish(0)
    ended = False
    async with running(shop, limits={"tenant_requests_max": 1000}) as rig, rig.client() as client:
        rig.engine.step_s = 0.001

        async def keep_calling() -> None:
            while not ended:
                prompt = (rng.randrange(1000), rng.randrange(1000))
                sent = time.monotonic()
                try:
                    done = await client.generate(TokenIds(prompt), adapter="acme/moving@prod", sampling=FOUR)
                except LoraplexError as error:
                    found.errors[error.code or type(error).__name__] += 1
                    continue
                found.replies += 1
                found.seen.add(done.header.adapter_digest)
                answers.append((sent, time.monotonic(), done.header.adapter_digest))
                wanted = tuple(answer(done.header.adapter, prompt, position) for position in range(4))
                found.wrong += done.token_ids != wanted

        answers: list[tuple[float, float, str]] = []
        callers = [asyncio.create_task(keep_calling()) for _ in range(CALLERS)]
        for number in range(1, count + 1):
            await asyncio.sleep(rng.uniform(0, 2 * pause_s))
            await asyncio.to_thread(publish, number)
            found.rolls += 1
        await asyncio.sleep(pause_s)
        ended = True
        await asyncio.gather(*callers)
        await rig.app.residency.check()
        found.accounted = rig.accounts_for(found.replies + sum(found.errors.values()))
    for sent, received, digest in answers:
        tagged = history[digest]
        found.untagged += not (tagged.since <= received and sent <= tagged.until)
    return found
