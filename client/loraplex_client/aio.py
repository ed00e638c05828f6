"""The asynchronous client, the same as `Client` with `await`. Use it in the event loop that made it.

async with AsyncClient("127.0.0.1:8470") as client:
    print((await client.generate("Hello", adapter="acme/orders@prod")).text)
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import grpc

from loraplex_client import _core
from loraplex_client.errors import LoraplexError
from loraplex_client.types import (
    AdapterInfo,
    ChatMessage,
    Completion,
    ConnectionSettings,
    Delta,
    Embedding,
    Header,
    LoadProgress,
    Prompt,
    RolloutArm,
    Sampling,
    Tls,
    TokenIds,
    Tokens,
    Validation,
)
from loraplex_protos.v1 import adapters_pb2 as apb
from loraplex_protos.v1 import adapters_pb2_grpc, generation_pb2_grpc

_DEFAULT_SAMPLING = Sampling()


class AsyncStream:
    """See `client.Stream`."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._collector = _core.Collector()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        with _named_errors():
            async for message in self._call:
                delta = self._collector.read(message)
                if delta is not None:
                    yield delta

    @property
    def header(self) -> Header | None:
        """Who answers."""
        return self._collector.header

    @property
    def completion(self) -> Completion:
        """The whole answer. Raises ServerFaultError before the end."""
        return self._collector.result()

    def cancel(self) -> None:
        """Stop generating; the server frees what it held."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """See `client.Client`."""

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        tls: Tls | None = None,
        retries: int = 0,
    ) -> None:
        """Args as in `ConnectionSettings`; nothing is sent before the first call.

        Raises:
            OSError: a file of `tls` cannot be read.
        """
        self._settings = ConnectionSettings(
            target=target, api_key=api_key, timeout_s=timeout_s, tls=tls, retries=retries
        )
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target)
        else:
            self._channel = grpc.aio.secure_channel(target, _core.channel_credentials(tls))
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._adapters: Any = adapters_pb2_grpc.AdapterServiceStub(self._channel)

    def stream(
        self,
        prompt: Prompt | Iterable[ChatMessage],
        *,
        adapter: str = "",
        sampling: Sampling = _DEFAULT_SAMPLING,
        timeout_s: float | None = None,
        request_id: str = "",
        priority: int = 0,
        session: str = "",
    ) -> AsyncStream:
        """See `Client.stream`."""
        request = _core.generate_request(
            prompt,
            adapter=adapter,
            sampling=sampling,
            request_id=request_id,
            priority=priority,
            session=session,
        )
        return AsyncStream(self._generation.Generate(request, **self._options(timeout_s)))

    async def generate(
        self,
        prompt: Prompt | Iterable[ChatMessage],
        *,
        adapter: str = "",
        sampling: Sampling = _DEFAULT_SAMPLING,
        timeout_s: float | None = None,
        request_id: str = "",
        priority: int = 0,
        session: str = "",
    ) -> Completion:
        """See `Client.generate`."""
        retries = self._settings.retries
        end = time.monotonic() + (self._settings.timeout_s if timeout_s is None else timeout_s)
        request_id = request_id or (_core.new_request_id() if retries else "")
        tried = 0
        while True:
            tried += 1
            try:
                async with self.stream(
                    prompt,
                    adapter=adapter,
                    sampling=sampling,
                    timeout_s=end - time.monotonic(),
                    request_id=request_id,
                    priority=priority,
                    session=session,
                ) as stream:
                    async for _ in stream:
                        pass
                    return stream.completion
            except LoraplexError as error:
                wait_s = _core.retry_wait_s(
                    error, tried=tried, retries=retries, remaining_s=end - time.monotonic()
                )
                if wait_s is None:
                    raise
            await asyncio.sleep(wait_s)

    async def tokenize(
        self, prompt: str | Iterable[ChatMessage], *, timeout_s: float | None = None
    ) -> Tokens:
        """See `Client.tokenize`."""
        with _named_errors():
            request = _core.tokenize_request(prompt)
            return _core.tokens_of(await self._generation.Tokenize(request, **self._options(timeout_s)))

    async def embed(
        self, prompt: str | TokenIds, *, adapter: str = "", timeout_s: float | None = None
    ) -> Embedding:
        """See `Client.embed`."""
        with _named_errors():
            request = _core.embed_request(prompt, adapter=adapter)
            return _core.embedding_of(await self._generation.Embed(request, **self._options(timeout_s)))

    async def list_adapters(self, *, timeout_s: float | None = None) -> AsyncIterator[AdapterInfo]:
        """See `Client.list_adapters`."""
        token = ""
        while True:
            request = apb.ListAdaptersRequest(page_token=token)
            with _named_errors():
                page = await self._adapters.ListAdapters(request, **self._options(timeout_s))
            for adapter in page.adapters:
                yield _core.adapter_of(adapter)
            token = page.next_page_token
            if not token:
                return

    async def get_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """See `Client.get_adapter`."""
        with _named_errors():
            request = apb.GetAdapterRequest(adapter=adapter)
            reply = await self._adapters.GetAdapter(request, **self._options(timeout_s))
            return _core.adapter_of(reply.adapter)

    async def load_adapter(
        self, adapter: str, *, stage_only: bool = False, timeout_s: float | None = None
    ) -> AsyncIterator[LoadProgress]:
        """See `Client.load_adapter`."""
        with _named_errors():
            request = apb.LoadAdapterRequest(adapter=adapter, stage_only=stage_only)
            async for message in self._adapters.LoadAdapter(request, **self._options(timeout_s)):
                yield _core.progress_of(message)

    async def unload_adapter(self, adapter: str, *, timeout_s: float | None = None) -> bool:
        """See `Client.unload_adapter`."""
        with _named_errors():
            request = apb.UnloadAdapterRequest(adapter=adapter)
            reply = await self._adapters.UnloadAdapter(request, **self._options(timeout_s))
            return bool(reply.was_resident)

    async def pin_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """See `Client.pin_adapter`."""
        with _named_errors():
            request = apb.PinAdapterRequest(adapter=adapter)
            reply = await self._adapters.PinAdapter(request, **self._options(timeout_s))
            return _core.adapter_of(reply.adapter)

    async def unpin_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """See `Client.unpin_adapter`."""
        with _named_errors():
            request = apb.UnpinAdapterRequest(adapter=adapter)
            reply = await self._adapters.UnpinAdapter(request, **self._options(timeout_s))
            return _core.adapter_of(reply.adapter)

    async def validate_adapter(self, adapter: str, *, timeout_s: float | None = None) -> Validation:
        """See `Client.validate_adapter`."""
        with _named_errors():
            request = apb.ValidateAdapterRequest(adapter=adapter)
            return _core.validation_of(
                await self._adapters.ValidateAdapter(request, **self._options(timeout_s))
            )

    async def get_rollout(self, adapter: str, *, timeout_s: float | None = None) -> tuple[RolloutArm, ...]:
        """See `Client.get_rollout`."""
        with _named_errors():
            request = apb.GetRolloutRequest(adapter=adapter)
            reply = await self._adapters.GetRollout(request, **self._options(timeout_s))
            return _core.arms_of(reply.rollout)

    async def resume_rollout(self, adapter: str, *, timeout_s: float | None = None) -> tuple[RolloutArm, ...]:
        """See `Client.resume_rollout`."""
        with _named_errors():
            request = apb.ResumeRolloutRequest(adapter=adapter)
            reply = await self._adapters.ResumeRollout(request, **self._options(timeout_s))
            return _core.arms_of(reply.rollout)

    async def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """See `Client.is_ready`."""
        check: Any = self._channel.unary_unary(_core.HEALTH_METHOD, bytes, bytes)
        try:
            return bool(await check(b"", timeout=timeout_s) == _core.HEALTH_SERVING)
        except grpc.RpcError:
            return False

    async def close(self) -> None:
        """End the connection; running calls are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _options(self, timeout_s: float | None) -> dict[str, Any]:
        timeout = self._settings.timeout_s if timeout_s is None else timeout_s
        return {"timeout": timeout, "metadata": _core.call_metadata(self._settings)}


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as failed:
        raise _core.error_of(failed) from None
