"""`loraplex adapters` against a running server: every word, for people and as JSON."""

import asyncio
import json
from typing import Any

import pytest

from loraplex_client.adapters import main
from tests.server.conftest import Shop
from tests.server.rig import Rig, running


class Terminal:
    """Runs the command against a server and reads what it says."""

    def __init__(self, rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
        self._rig, self._capsys = rig, capsys

    async def run(self, *words: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        command, *rest = words
        status = await asyncio.to_thread(
            main, [command, "--server", f"127.0.0.1:{self._rig.app.port}", *rest]
        )
        told = self._capsys.readouterr()
        return status, told.out, told.err

    async def json(self, *words: str) -> list[dict[str, Any]]:
        status, out, err = await self.run(*words, "--json")
        assert (status, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]


async def test_an_adapter_comes_is_kept_and_goes(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    digest = shop.publish("acme/orders", tag="prod").digest
    async with running(shop) as rig:
        terminal = Terminal(rig, capsys)
        (absent,) = await terminal.json("show", "acme/orders@prod")
        assert (absent["state"], absent["digest"]) == ("absent", digest)
        *_, staged = await terminal.json("load", "acme/orders@prod", "--stage-only")
        assert staged["adapter"]["state"] == "staged"
        assert not rig.engine.adapters
        status, out, _ = await terminal.run("load", "acme/orders@prod")
        assert (status, out.splitlines()[-1].split(" after")[0]) == (0, f"acme/orders@{digest} is resident")
        assert (await terminal.json("pin", "acme/orders"))[0]["pinned"]
        status, out, _ = await terminal.run("list")
        assert (status, out.split()[:2]) == (0, ["resident", f"acme/orders@{digest}"])
        assert out.rstrip().endswith("pinned")
        assert not (await terminal.json("unpin", "acme/orders"))[0]["pinned"]
        assert await terminal.json("unload", "acme/orders") == [{"was_resident": True}]
        assert await terminal.json("list") == []


async def test_validate_tells_each_check_and_fails_where_a_load_would(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.publish("acme/orders")
    shop.publish("acme/large", rank=32)
    async with running(shop) as rig:
        terminal = Terminal(rig, capsys)
        status, out, _ = await terminal.run("validate", "acme/orders")
        assert status == 0
        assert "passed    weights" in out
        assert "a slot at once" in out.splitlines()[-1]
        status, out, _ = await terminal.run("validate", "acme/large")
        assert status == 1
        assert "failed    weights  RANK_TOO_LARGE: " in out
        status, out, _ = await terminal.run("validate", "acme/large", "--json")
        assert (status, json.loads(out)["valid"]) == (1, False)


async def test_rollout_shows_shares_and_resume_is_one_word(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.publish("acme/orders", seed=1, tag="prod")
    (shop.root / "splits.toml").write_text('"acme/orders" = "prod=90,canary=10"')
    async with running(shop, rollouts={"splits": "splits.toml"}) as rig:
        terminal = Terminal(rig, capsys)
        _, out, _ = await terminal.run("rollout", "acme/orders")
        assert [line.split()[:2] for line in out.splitlines()] == [["prod", "100%"], ["canary", "is"]]
        shop.publish("acme/orders", seed=2, tag="canary")
        assert [arm["share"] for arm in await terminal.json("resume", "acme/orders")] == [0.9, 0.1]
        shop.publish("acme/other")
        assert (await terminal.run("rollout", "acme/other"))[1] == "calls for acme/other are not split here\n"


async def test_it_says_in_one_line_why_not(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(shop) as rig:
        status, out, err = await Terminal(rig, capsys).run("show", "acme/none")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.rstrip().endswith("[ADAPTER_NOT_FOUND]")


@pytest.mark.parametrize("words", [[], ["lists"], ["show"], ["list", "acme/orders"]])
def test_wrong_usage_is_status_two(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
