"""One call is one line, whatever names it has, and no line holds a secret."""

import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_client import AdapterNotFoundError, UnauthenticatedError
from loraplex_server.identity.api_keys import make_key
from loraplex_server.observability.access_log import AccessLog, send_json_lines_to_stdout
from loraplex_server.observability.journey import Journey
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def line_of(journey: Journey, kind: str, caplog: pytest.LogCaptureFixture, *, trace_id: str = "") -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="loraplex.access"):
        AccessLog(kind).write(journey, trace_id=trace_id)
    [record] = caplog.records
    return record.getMessage()


def pairs(line: str) -> dict[str, str]:
    """Read a line of text as its reader would: name=value, with quotes around what is not plain."""
    found = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ "=]+)(?: |$)', line)
    assert " ".join(f"{name}={value}" for name, value in found) == line, "something stands between the fields"
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


def a_journey(**more: object) -> Journey:
    return Journey(method="/loraplex.v1.GenerationService/Generate", call_id="ab12", arrived=5.0, **more)  # type: ignore[arg-type]


@given(who=st.text(min_size=1), model=st.text(min_size=1), trace_id=st.text())
def test_no_name_can_forge_a_line_or_a_field(who: str, model: str, trace_id: str) -> None:
    caught: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: caught.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("loraplex.access")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        for kind in ("text", "json"):
            AccessLog(kind).write(a_journey(who=who, model=model, reason="REVOKED"), trace_id=trace_id)
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    text, as_json = caught
    for line in caught:
        assert line.isprintable()
        assert len(line.splitlines()) == 1
    read = pairs(text)
    assert (read["who"], read["model"], read["reason"]) == (who, model, "REVOKED")
    found = json.loads(as_json)
    assert (found["who"], found["model"], found["reason"]) == (who, model, "REVOKED")
    assert found.get("trace", "") == trace_id


def test_a_line_says_how_long_each_part_took(caplog: pytest.LogCaptureFixture) -> None:
    journey = a_journey(
        who="acme/app", tenant="acme", model="acme/orders@prod", adapter_digest="sha256:aa", prompt_tokens=7,
        output_tokens=4, finish_reasons=("stop",), first_token=5.75, ended=6.5,
        arrived_unix_ns=1_700_000_000_250_000_000,
    )  # fmt: skip
    journey.stages = [("resolve", 5.0), ("queue", 5.125), ("adapter", 5.25), ("engine", 5.5)]
    assert json.loads(line_of(journey, "json", caplog, trace_id="0af7")) == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "method": "/loraplex.v1.GenerationService/Generate",
        "who": "acme/app",
        "tenant": "acme",
        "reason": "OK",
        "call": "ab12",
        "model": "acme/orders@prod",
        "digest": "sha256:aa",
        "finish": "stop",
        "trace": "0af7",
        "prompt_tokens": 7,
        "output_tokens": 4,
        "queue_ms": 125.0,
        "adapter_ms": 250.0,
        "first_token_ms": 750.0,
        "ms": 1500.0,
    }
    assert pairs(line_of(journey, "text", caplog))["queue_ms"] == "125.0"


def test_a_call_that_failed_early_says_only_what_is_known(caplog: pytest.LogCaptureFixture) -> None:
    journey = a_journey(reason="UNAUTHENTICATED", ended=5.001)
    line = line_of(journey, "text", caplog)
    assert line == (
        "method=/loraplex.v1.GenerationService/Generate who=- reason=UNAUTHENTICATED call=ab12 ms=1.0"
    )


def test_off_is_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="loraplex.access"):
        AccessLog("off").write(a_journey())
    assert not caplog.records


def test_lines_for_machines_are_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("loraplex.access")
    send_json_lines_to_stdout()
    try:
        log.setLevel(logging.INFO)
        AccessLog("json").write(a_journey(who="acme/app"))
    finally:
        log.handlers.clear()
        log.propagate = True
        log.setLevel(logging.NOTSET)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["who"] == "acme/app"
    assert shown.err == ""


async def test_every_call_leaves_one_line_without_credential_or_prompt(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    digest = shop.publish("acme/orders").digest
    key, entry = make_key("app", "acme")
    with caplog.at_level(logging.INFO):
        async with running(shop, keys=entry, server={"access_log": "json"}) as rig:
            async with rig.client(key) as client:
                await client.generate("tell nobody", adapter="acme/orders", sampling=FOUR)
                with pytest.raises(AdapterNotFoundError):
                    await client.get_adapter("acme/absent")
            async with rig.client("lpx_wrong-secret") as client:
                with pytest.raises(UnauthenticatedError):
                    await client.generate("tell nobody", sampling=FOUR)
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "loraplex.access"]
    answered, absent, refused = lines
    assert answered["who"] == "acme/app"
    assert answered["digest"] == digest
    assert (answered["prompt_tokens"], answered["output_tokens"]) == (11, 4)
    assert answered["first_token_ms"] <= answered["ms"]
    assert (absent["reason"], absent["model"]) == ("ADAPTER_NOT_FOUND", "acme/absent")
    assert (refused["reason"], refused["who"]) == ("UNAUTHENTICATED", "-")
    everything = "\n".join(record.getMessage() for record in caplog.records)
    assert key not in everything
    assert "wrong-secret" not in everything
    assert "tell nobody" not in everything
