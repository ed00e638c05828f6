"""Structured output: what is refused before anything is tried, and how trials are shared among tenants."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from loraplex_protos.v1 import generation_pb2 as pb
from loraplex_server.engine import form_trials
from loraplex_server.engine.choices import choice_grammar
from loraplex_server.engine.form_trials import FormTrials
from loraplex_server.engine.protocol import Form
from loraplex_server.errors import EngineUnavailableError, InvalidRequestError
from loraplex_server.requests.forms import FORM_BYTES_MAX, SCHEMA_DEPTH_MAX, parse_form
from loraplex_server.requests.schemas import check_schema
from tests.server.rig import until


def output(**form: Any) -> pb.StructuredOutput:
    return pb.StructuredOutput(**form)


def nested(depth: int) -> str:
    return '{"items":' * (depth - 1) + "{}" + "}" * (depth - 1)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (output(), "form"),
        (output(json_schema=""), "form.json_schema"),
        (output(json_schema="{"), "form.json_schema"),
        (output(json_schema="3"), "form.json_schema"),
        (output(json_schema='{"minimum": NaN}'), "form.json_schema"),
        (output(json_schema="[" * 60_000), "form.json_schema"),
        (output(json_schema=nested(SCHEMA_DEPTH_MAX + 1)), "form.json_schema"),
        (output(json_schema='{"items": {"$ref": "file:///etc/passwd"}}'), "form.json_schema"),
        (output(json_schema='{"' + "x" * FORM_BYTES_MAX + '": 1}'), "form.json_schema"),
        (output(regex=""), "form.regex"),
        (output(regex="a\0"), "form.regex"),
        (output(regex="ü" * (FORM_BYTES_MAX // 2 + 1)), "form.regex"),
        (output(grammar="root: 'a'"), "form.grammar"),
        (output(grammar="# root ::= 'a'\n// a ::= b"), "form.grammar"),
        (output(choice=pb.Choices()), "form.choice"),
        (output(choice=pb.Choices(texts=["a", ""])), "form.choice"),
        (output(choice=pb.Choices(texts=["a"] * 257)), "form.choice"),
    ],
)
def test_what_is_malformed_too_large_or_too_deep_is_refused_by_name(
    message: pb.StructuredOutput, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_form(message, field="form")
    assert caught.value.field == field


def test_the_deepest_schema_and_references_within_it_pass() -> None:
    text = nested(SCHEMA_DEPTH_MAX)
    assert parse_form(output(json_schema=text), field="form") == Form("json_schema", text)
    inner = '{"$defs": {"a": {}}, "$ref": "#/$defs/a"}'
    assert parse_form(output(json_schema=inner), field="form").text == inner


def test_a_schema_as_programs_write_them_passes() -> None:
    class Size(BaseModel):
        kind: Literal["wide", "tall"] = Field(description="which way")
        centimetres: int = Field(ge=1, le=300)

    class Order(BaseModel):
        number: str = Field(pattern=r"^[0-9]{4}$")
        sizes: list[Size] = Field(min_length=1, max_length=3)
        note: str | None = None
        prices: dict[str, float] = {}
        of: Size | int

    check_schema(Order.model_json_schema(), field="f")
    check_schema({**Order.model_json_schema(), "additionalProperties": False, "x-origin": "here"}, field="f")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"not": {"type": "string"}}, "# says not"),
        ({"type": "object", "properties": {"a": {"if": {}, "then": {}}}}, "#/properties/a says if"),
        ({"type": "array", "items": {"type": "string", "minimum": 3}}, "#/items says minimum"),
        ({"minLength": 3}, "# says minLength"),
        ({"uniqueItems": True, "type": "array"}, "# says uniqueItems"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "# says dependentRequired"),
        ({"type": "object", "required": ["a"]}, "# requires"),
        ({"anyOf": [{"type": "string"}], "maxLength": 3}, "# says maxLength beside anyOf"),
        ({"$defs": {"x": {"not": {}}}, "$ref": "#/$defs/x"}, "#/$defs/x says not"),
        ({"$ref": "#/$defs/x", "maxLength": 3, "$defs": {"x": {}}}, "# says maxLength beside"),
        ({"$ref": "https://schemas.example/x"}, "# refers"),
        ({"allOf": [{"type": "string"}, {"type": "string"}]}, "# has several"),
        ({"type": "string", "enum": ["a", 1]}, "# has values"),
        ({"type": "integer", "const": True}, "# has values"),
        ({"type": "string", "enum": "a"}, "# has values"),
        ({"type": ["string", "integer"], "format": "date", "pattern": "^a$"}, "# says pattern beside format"),
        ({"type": "string", "pattern": "^a$", "maxLength": 3}, "# says maxLength beside pattern"),
        ({"type": "wat"}, "# has an unknown type"),
        ({"type": {"a": 1}}, "# has an unknown type"),
        ({"type": "object", "required": [[]]}, "# requires"),
        ({"type": "object", "required": "a"}, "# has required"),
    ],
)
def test_what_an_answer_could_not_be_kept_to_is_refused_at_its_place(schema: Any, place: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_schema(schema, field="f")
    assert caught.value.problem.startswith(place)


words = st.sampled_from(
    [
        "type",
        "properties",
        "items",
        "anyOf",
        "enum",
        "const",
        "required",
        "$ref",
        "allOf",
        "minimum",
        "string",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(words, values, max_size=4))
def test_any_json_object_is_a_schema_or_refused(schema: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequestError):
        check_schema(schema, field="f")


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5))
def test_a_choices_grammar_holds_its_texts_and_nothing_that_ends_a_string(texts: list[str]) -> None:
    grammar = choice_grammar(tuple(texts))
    assert grammar.isascii()
    assert "\n" not in grammar
    quoted = grammar.removeprefix("root ::= ").split(" | ")
    assert [part[1:-1].encode("ascii").decode("unicode_escape") for part in quoted] == texts


SANDBOX = """
import json, sys, time
if "broken" in sys.argv: print(json.dumps({"ready": "no tokenizer"}), flush=True); sys.exit(1)
print(json.dumps({"ready": None}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    with open(sys.argv[1], "a") as log: log.write(asked["text"] + "\\n")
    word = asked["text"].split("-")[0]
    if word == "die": sys.exit(1)
    time.sleep(0.05 if word == "slow" else 0)
    print(json.dumps({"problem": "is bad" if word == "bad" else None, "tried": word != "busy"}), flush=True)
"""
"""Speaks the sandbox's protocol; the real one is tried in tests/e2e/test_requests.py."""


class Sandboxed:
    def __init__(self, trials: FormTrials, log: Path) -> None:
        self.trials, self._log = trials, log

    async def check(self, text: str, tenant: str = "acme") -> None:
        await self.trials.check(Form("regex", text), tenant=tenant, field="f")

    def tried(self) -> list[str]:
        return self._log.read_text().split() if self._log.exists() else []


@asynccontextmanager
async def sandboxed(folder: Path, *arguments: str) -> AsyncIterator[Sandboxed]:
    (folder / "sandbox.py").write_text(SANDBOX)
    log = folder / "log"
    trials = FormTrials([sys.executable, str(folder / "sandbox.py"), str(log), *arguments])
    try:
        yield Sandboxed(trials, log)
    finally:
        await trials.close()


async def test_an_outcome_is_remembered_for_the_tenant_that_asked(tmp_path: Path) -> None:
    async with sandboxed(tmp_path) as box:
        for _ in range(2):
            await box.check("good")
            with pytest.raises(InvalidRequestError, match="f: is bad"):
                await box.check("bad")
        assert box.tried() == ["good", "bad"]
        await box.check("good", "globex")
        assert box.tried() == ["good", "bad", "good"]


async def test_forgotten_outcomes_are_found_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(form_trials, "REMEMBERED_MAX", 2)
    async with sandboxed(tmp_path) as box:
        for text in ("a", "b", "c", "a"):
            await box.check(text)
        assert box.tried() == ["a", "b", "c", "a"]


async def test_a_tenant_with_many_forms_keeps_nobody_waiting_for_all_of_them(tmp_path: Path) -> None:
    async with sandboxed(tmp_path) as box:
        await box.check("first")
        flood = [asyncio.create_task(box.check(f"slow-{number}")) for number in range(10)]
        await until(lambda: "slow-0" in box.tried())
        await box.check("mine", "globex")
        assert len(box.tried()) <= 1 + 2 + 1, "after the trial that ran, and at most one more"
        for call in flood:
            call.cancel()
        await asyncio.gather(*flood, return_exceptions=True)


async def test_callers_that_leave_neither_confuse_replies_nor_pile_up_trials(tmp_path: Path) -> None:
    async with sandboxed(tmp_path) as box:
        await box.check("first")
        for number in range(5):
            leaving = asyncio.create_task(box.check(f"slow-{number}"))
            await until(lambda number=number: f"slow-{number}" in box.tried())  # type: ignore[misc]
            leaving.cancel()
            assert len(box.trials._trials) == 1
        with pytest.raises(InvalidRequestError):
            await box.check("bad")
        await box.check("good")


async def test_what_could_not_be_tried_is_neither_passed_nor_remembered(tmp_path: Path) -> None:
    async with sandboxed(tmp_path) as box:
        for text in ("die", "busy", "die"):
            with pytest.raises(EngineUnavailableError):
                await box.check(text)
        await box.check("good")
        assert box.tried() == ["die", "busy", "die", "good"]
    (tmp_path / "other").mkdir()
    async with sandboxed(tmp_path / "other", "broken") as box:
        with pytest.raises(EngineUnavailableError, match="cannot be checked"):
            await box.check("good")


async def test_the_sandbox_gets_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    async with sandboxed(tmp_path) as box:
        await box.check("good")
        process = box.trials._process
        assert process is not None
        environment = await asyncio.to_thread(Path(f"/proc/{process.pid}/environ").read_text)
        assert "PATH=" in environment
        assert "hunter2" not in environment
