"""The OpenAI-compatible port, asked by the stock `openai` client and by hand."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.errors import InvalidRequestError
from loraplex_server.identity.api_keys import make_key
from loraplex_server.ports.openai_wire import parse_json, parse_request
from tests.registry.pki import Authority
from tests.server.conftest import Shop
from tests.server.ports.test_tls import NOW, files
from tests.server.rig import Rig, running, until
from tests.sim.engine import answer

HTTP = {"server": {"http_listen": "127.0.0.1:0"}}


@asynccontextmanager
async def asking(rig: Rig, key: str = "none", **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The stock client of this server."""
    address = f"http://127.0.0.1:{rig.app.http_port}/v1"
    async with openai.AsyncOpenAI(
        **{"base_url": address, "api_key": key, "max_retries": 0, "timeout": 20, **options}
    ) as client:
        yield client


async def test_a_conversation_with_a_tenants_adapter_whole_and_streamed(shop: Shop) -> None:
    published = shop.publish("acme/orders", tag="prod")
    key, entry = make_key("app", "acme")
    async with running(shop, keys=entry, **HTTP) as rig, asking(rig, key) as client:
        said = [{"role": "user", "content": "ab"}]
        name = f"acme/orders@{published.digest}"
        expected = "".join(f"{answer(name, (97, 98), position)} " for position in range(4))
        whole = await client.chat.completions.create(
            model="acme/orders@prod", messages=said, max_tokens=4, temperature=0, user="ada"
        )
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (
            2,
            4,
            6,
        )
        assert published.digest[:19] in str(whole.system_fingerprint)
        stream = await client.chat.completions.create(
            model="acme/orders@prod",
            messages=[{"role": "user", "content": [{"type": "text", "text": "ab"}]}],
            max_completion_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces = [piece async for piece in stream]
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == expected
        assert pieces[0].choices[0].delta.role == "assistant"
        assert pieces[-2].choices[0].finish_reason == "length"
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.completion_tokens == 4
        raw = await client.completions.with_raw_response.create(
            model="acme/orders@prod", prompt=[97, 98], max_tokens=4
        )
        assert raw.headers["x-loraplex-adapter-digest"] == published.digest
        assert raw.headers["x-loraplex-base-digest"] == shop.base.digest
        assert raw.parse().choices[0].text == expected
        listed = [model.id async for model in client.models.list()]
        assert listed == ["sim", name]
        base = await client.completions.create(model="sim", prompt="ab", max_tokens=2)
        assert base.choices[0].text == "".join(f"{answer('', (97, 98), position)} " for position in range(2))
        assert rig.outcomes()["completed"] == 4


async def test_refusals_are_openais_errors_with_our_reasons(shop: Shop) -> None:
    shop.publish("acme/orders")
    shop.publish("acme/forged", seed=3, signer="globex")
    acme, acme_entry = make_key("app", "acme")
    globex, globex_entry = make_key("rival", "globex")
    async with running(shop, keys=acme_entry + globex_entry, **HTTP) as rig:
        async with asking(rig, "wrong") as client:
            with pytest.raises(openai.AuthenticationError) as unknown:
                await client.completions.create(model="sim", prompt="x")
            assert unknown.value.code == "UNAUTHENTICATED"
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with asking(rig, globex) as client:
            texts = set()
            for name in ("acme/orders", "acme/absent"):
                with pytest.raises(openai.NotFoundError) as missing:
                    await client.completions.create(model=name, prompt="x")
                texts.add(missing.value.message.replace(name, "NAME"))
            assert len(texts) == 1
            assert [model.id async for model in client.models.list()] == ["sim"]
        async with asking(rig, acme) as client:
            with pytest.raises(openai.UnprocessableEntityError) as forged:
                await client.completions.create(model="acme/forged", prompt="x")
            assert forged.value.code == "SIGNATURE_INVALID"
            for wrong in (
                {"n": 0},
                {"n": 2, "temperature": 0},
                {"n": 2, "best_of": 2},
                {"logprobs": 21},
                {"logprobs": 20, "n": 16, "max_tokens": 800},
                {"logprobs": True},
                {"echo": True},
                {"extra_body": {"response_format": {"type": "xml"}}},
                {"extra_body": {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}},
                {
                    "extra_body": {
                        "response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}
                    }
                },
                {"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}},
                {"extra_body": {"structured_outputs": {"choice": ["b", 3]}}},
                {"extra_body": {"min_tokens": 3, "max_tokens": 2}},
                {"temperature": 9},
                {"max_tokens": -1},
                {"prompt": ["a", "b"]},
                {"prompt": {}},
                {"stop": 3},
                {"extra_body": {"top_k": -1}},
                {"extra_body": {"wat": 1}},
                {"extra_body": {"priority": 2**40}},
            ):
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.completions.create(**{"model": "sim", "prompt": "x", **wrong})  # type: ignore[arg-type]
                assert caught.value.code == "INVALID_ARGUMENT"
            with pytest.raises(openai.BadRequestError) as long:
                await client.completions.create(model="sim", prompt="x", max_tokens=10_000)
            assert long.value.code == "CONTEXT_TOO_LONG"


async def test_choices_log_probabilities_and_schemas_over_http(shop: Shop) -> None:
    async with running(shop, **HTTP) as rig, asking(rig) as client:
        said: Any = [{"role": "user", "content": "ab"}]
        several: dict[str, Any] = {"model": "sim", "max_tokens": 3, "seed": 7, "n": 2}
        texts = ["".join(f"{answer('', (97, 98), place, seed)} " for place in range(3)) for seed in (7, 8)]
        chat = await client.chat.completions.create(**several, messages=said, logprobs=True, top_logprobs=2)
        assert [choice.message.content for choice in chat.choices] == texts
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 6
        told = chat.choices[1].logprobs.content
        assert "".join(each.token for each in told) == texts[1]
        assert [[top.logprob for top in each.top_logprobs] for each in told] == [[-0.5, -1.5]] * 3
        assert bytes(told[0].bytes).decode() == told[0].token
        plain = await client.completions.create(**several, prompt="ab", logprobs=1)
        told = plain.choices[0].logprobs
        assert "".join(told.tokens) == plain.choices[0].text == texts[0]
        assert told.text_offset == [0, len(told.tokens[0]), len(told.tokens[0] + told.tokens[1])]
        assert told.top_logprobs == [{token: -0.5} for token in told.tokens]
        rig.engine.step_s = 0.002
        stream = await client.chat.completions.create(
            **several, messages=said, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
        pieces = [piece async for piece in stream]
        for index, text in enumerate(texts):
            mine = [choice for piece in pieces for choice in piece.choices if choice.index == index]
            assert "".join(choice.delta.content or "" for choice in mine) == text
            assert [choice.finish_reason for choice in mine] == [None] * 3 + ["length"]
            assert [choice.delta.role for choice in mine] == ["assistant", None, None, None]
            assert all(choice.logprobs.content[0].logprob == -0.5 for choice in mine[:3])
        assert [len(piece.choices) for piece in pieces] == [1] * 8 + [0]
        for form in (
            {"type": "json_object"},
            {
                "type": "json_schema",
                "json_schema": {"name": "any", "schema": {"type": "object"}, "strict": True},
            },
        ):
            done = await client.chat.completions.create(model="sim", messages=said, response_format=form)  # type: ignore[arg-type,call-overload]
            assert done.choices[0].message.content == "{}"
            assert done.choices[0].finish_reason == "stop"
        chosen = await client.completions.create(
            model="sim", prompt="ab", extra_body={"structured_outputs": {"choice": ["one"]}}
        )
        assert chosen.choices[0].text == "one"
        with pytest.raises(openai.BadRequestError, match="needs logprobs"):
            await client.chat.completions.create(model="sim", messages=said, top_logprobs=2)


async def test_a_full_server_says_when_to_come_again(shop: Shop) -> None:
    async with running(shop, limits={"requests_max": 1}, **HTTP) as rig, asking(rig) as client:
        rig.engine.may_go_on.clear()
        first = asyncio.create_task(client.completions.create(model="sim", prompt="x", max_tokens=1))
        await until(lambda: rig.engine.running == 1)
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model="sim", prompt="x", max_tokens=1)
        assert full.value.code == "QUEUE_FULL"
        assert int(full.value.response.headers["retry-after"]) >= 1
        rig.engine.may_go_on.set()
        await first


async def test_a_caller_that_hangs_up_frees_the_engine(shop: Shop) -> None:
    async with running(shop, **HTTP) as rig, asking(rig) as client:
        rig.engine.step_s = 0.02
        stream = await client.completions.create(model="sim", prompt="x", max_tokens=60, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await until(lambda: rig.engine.running == 0 and rig.app._gate.backend.scheduler.held == 0)
        assert rig.outcomes()["cancelled"] == 1
        whole = asyncio.create_task(client.completions.create(model="sim", prompt="x", max_tokens=60))
        await until(lambda: rig.engine.running == 1)
        whole.cancel()
        await until(lambda: rig.engine.running == 0)


async def test_an_engine_that_dies_ends_a_stream_with_an_error_object(shop: Shop) -> None:
    async with running(shop, **HTTP) as rig, asking(rig) as client:
        rig.engine.step_s = 0.01
        stream = await client.completions.create(model="sim", prompt="x", max_tokens=60, stream=True)

        async def read() -> None:
            async for _ in stream:
                rig.engine.dead = True

        with pytest.raises(openai.APIError, match="dead on order"):
            await read()
        rig.engine.dead = False


async def test_every_other_path_and_body_is_a_plain_refusal(shop: Shop) -> None:
    async with (
        running(shop, **HTTP) as rig,
        aiohttp.ClientSession(f"http://127.0.0.1:{rig.app.http_port}") as http,
    ):
        async with http.get("/health") as healthy:
            assert healthy.status == 200
        for method, path, body, status in (
            ("GET", "/v1/nothing", b"", 404),
            ("GET", "/v1/completions", b"", 405),
            ("POST", "/v1/completions", b"", 400),
            ("POST", "/v1/completions", b"[]", 400),
            ("POST", "/v1/completions", b'{"model": "sim", "prompt": NaN}', 400),
            ("POST", "/v1/completions", b'{"model": "sim", "prompt": "\\ud800"}', 400),
            ("POST", "/v1/completions", b"[" * 100_000, 400),
            ("POST", "/v1/chat/completions", b'{"model": "sim", "messages": [{"role": "user"}]}', 400),
            ("POST", "/v1/chat/completions", b'{"model": "sim", "messages": []}', 400),
            ("POST", "/v1/completions", b" " * (5 << 20), 400),
        ):
            async with http.request(method, path, data=body) as reply:
                assert reply.status == status, (method, path, body[:40])
                error = (await reply.json())["error"]
                assert error["message"]
                assert error["code"] in ("INVALID_ARGUMENT", "UNIMPLEMENTED")
        rig.app._gate.close()
        async with http.get("/health") as starting:
            assert starting.status == 503


async def test_the_http_port_is_encrypted_as_the_grpc_port_is(shop: Shop) -> None:
    tls = files(shop.root, Authority.make(NOW))
    key, entry = make_key("app", "acme")
    async with running(shop, keys=entry, tls=tls, **HTTP) as rig:
        address = f"https://127.0.0.1:{rig.app.http_port}/v1"
        context = ssl.create_default_context(cafile=shop.root / "ca.pem")
        believing = httpx.AsyncClient(verify=context)
        async with asking(rig, key, base_url=address, http_client=believing) as client:
            done = await client.completions.create(model="sim", prompt="x", max_tokens=2)
            assert done.choices[0].finish_reason == "length"
        async with asking(rig, key) as plain:
            with pytest.raises(openai.APIConnectionError):
                await plain.completions.create(model="sim", prompt="x", max_tokens=2)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "temperature", "stop", "stop_token_ids", "seed", "stream",
    "stream_options", "n", "logprobs", "top_logprobs", "top_k", "min_tokens", "priority", "user", "response_format",
    "structured_outputs",
]  # fmt: skip


def refused_field(work: Callable[[], object]) -> str | None:
    """The field that a refusal names; None when there is none. Any other error is passed on."""
    try:
        work()
    except InvalidRequestError as error:
        return error.field
    return None


@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.booleans())
@settings(max_examples=400)
def test_no_body_ends_in_anything_but_a_request_or_a_named_refusal(value: dict[str, Any], chat: bool) -> None:
    assert refused_field(lambda: parse_request(value, chat=chat, base_model="sim")) != ""


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    assert refused_field(lambda: parse_json(body)) in (None, "body")


def test_the_names_of_fields_in_refusals_are_short() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_request({"x" * 10_000: 1}, chat=False, base_model="sim")
    assert len(str(caught.value)) < 200
