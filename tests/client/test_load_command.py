"""`loraplex load` against a running server."""

import asyncio
import json

import pytest

from loraplex_client.load import main
from tests.server.conftest import Shop
from tests.server.rig import running


@pytest.mark.parametrize(("flags", "state"), [(["--stage-only"], "staged"), ([], "resident")])
async def test_it_brings_an_adapter_into_memory_or_into_the_engine(
    shop: Shop, capsys: pytest.CaptureFixture[str], flags: list[str], state: str
) -> None:
    published = shop.publish("acme/orders")
    async with running(shop) as rig:
        arguments = ["acme/orders", "--server", f"127.0.0.1:{rig.app.port}", *flags]
        assert await asyncio.to_thread(main, arguments) == 0
        assert len(rig.engine.adapters) == (state == "resident")
    told = capsys.readouterr()
    shown = json.loads(told.out)
    assert (shown["digest"], shown["state"]) == (published.digest, state)
    assert told.err.splitlines()[-1].endswith("ready")


async def test_it_says_in_one_line_why_not(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(shop) as rig:
        arguments = ["acme/none", "--server", f"127.0.0.1:{rig.app.port}"]
        assert await asyncio.to_thread(main, arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("[ADAPTER_NOT_FOUND]")
