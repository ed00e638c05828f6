"""The synchronous client. Thread-safe: one client may be used by many threads.

with Client("127.0.0.1:8470") as client:
    print(client.generate("Hello", adapter="acme/orders@prod").text)
"""

import time
from collections.abc import Iterable, Iterator
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


class Stream:
    """One running call: iterate it for deltas. Leaving the `with` block, or `cancel`, ends the call.

    `header` is known from the first delta on, `completion` after the last.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._collector = _core.Collector()

    def __iter__(self) -> Iterator[Delta]:
        with _named_errors():
            for message in self._call:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """Calls a loraplex server. Every method raises the errors of `loraplex_client.errors`."""

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
            self._channel = grpc.insecure_channel(target)
        else:
            self._channel = grpc.secure_channel(target, _core.channel_credentials(tls))
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)

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
    ) -> Stream:
        """Start generating; iterate the result for the pieces of the answer.

        Args:
            prompt: raw text, chat messages, or token ids.
            adapter: "tenant/adapter[@tag|@version|@sha256:...]", or with a split, "tenant/adapter@prod=95,canary=5";
                "" for the base model.
            sampling: how tokens are chosen.
            timeout_s: for the whole call.
            request_id: to find the call in the server's log; a second call with the same id and content gets the
                same answer, while the first runs and for a while after.
            priority: greater goes first among the tenant's own waiting calls, -100 to 100.
            session: where calls are split between tags, calls with the same session get the same one.
        """
        request = _core.generate_request(
            prompt,
            adapter=adapter,
            sampling=sampling,
            request_id=request_id,
            priority=priority,
            session=session,
        )
        return Stream(self._generation.Generate(request, **self._options(timeout_s)))

    def generate(
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
        """Generate a whole answer; arguments as `stream`. Tries again as `ConnectionSettings.retries` says."""
        retries = self._settings.retries
        end = time.monotonic() + (self._settings.timeout_s if timeout_s is None else timeout_s)
        request_id = request_id or (_core.new_request_id() if retries else "")
        tried = 0
        while True:
            tried += 1
            try:
                with self.stream(
                    prompt,
                    adapter=adapter,
                    sampling=sampling,
                    timeout_s=end - time.monotonic(),
                    request_id=request_id,
                    priority=priority,
                    session=session,
                ) as stream:
                    for _ in stream:
                        pass
                    return stream.completion
            except LoraplexError as error:
                wait_s = _core.retry_wait_s(
                    error, tried=tried, retries=retries, remaining_s=end - time.monotonic()
                )
                if wait_s is None:
                    raise
            time.sleep(wait_s)

    def tokenize(self, prompt: str | Iterable[ChatMessage], *, timeout_s: float | None = None) -> Tokens:
        """The token ids that `generate` would see for a prompt."""
        with _named_errors():
            request = _core.tokenize_request(prompt)
            return _core.tokens_of(self._generation.Tokenize(request, **self._options(timeout_s)))

    def embed(
        self, prompt: str | TokenIds, *, adapter: str = "", timeout_s: float | None = None
    ) -> Embedding:
        """The vector of a prompt, from a server whose base model is served for that."""
        with _named_errors():
            request = _core.embed_request(prompt, adapter=adapter)
            return _core.embedding_of(self._generation.Embed(request, **self._options(timeout_s)))

    def list_adapters(self, *, timeout_s: float | None = None) -> Iterator[AdapterInfo]:
        """This key's adapters that are on the server, sorted by name; pages are fetched as needed."""
        token = ""
        while True:
            request = apb.ListAdaptersRequest(page_token=token)
            with _named_errors():
                page = self._adapters.ListAdapters(request, **self._options(timeout_s))
            yield from map(_core.adapter_of, page.adapters)
            token = page.next_page_token
            if not token:
                return

    def get_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """One adapter, resident or not."""
        with _named_errors():
            request = apb.GetAdapterRequest(adapter=adapter)
            return _core.adapter_of(self._adapters.GetAdapter(request, **self._options(timeout_s)).adapter)

    def load_adapter(
        self, adapter: str, *, stage_only: bool = False, timeout_s: float | None = None
    ) -> Iterator[LoadProgress]:
        """Bring an adapter in; the last step is "ready" and carries it.

        Args:
            adapter: reference, as of `generate`.
            stage_only: only into memory, so that a later load is quick; it takes no slot.
            timeout_s: seconds for the whole call; default the client's.
        """
        with _named_errors():
            request = apb.LoadAdapterRequest(adapter=adapter, stage_only=stage_only)
            for message in self._adapters.LoadAdapter(request, **self._options(timeout_s)):
                yield _core.progress_of(message)

    def unload_adapter(self, adapter: str, *, timeout_s: float | None = None) -> bool:
        """Free its slot once its requests have ended; whether it was there."""
        with _named_errors():
            request = apb.UnloadAdapterRequest(adapter=adapter)
            return bool(self._adapters.UnloadAdapter(request, **self._options(timeout_s)).was_resident)

    def pin_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Bring an adapter in and keep it from being evicted."""
        with _named_errors():
            request = apb.PinAdapterRequest(adapter=adapter)
            return _core.adapter_of(self._adapters.PinAdapter(request, **self._options(timeout_s)).adapter)

    def unpin_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Make a pinned adapter evictable again."""
        with _named_errors():
            request = apb.UnpinAdapterRequest(adapter=adapter)
            return _core.adapter_of(self._adapters.UnpinAdapter(request, **self._options(timeout_s)).adapter)

    def validate_adapter(self, adapter: str, *, timeout_s: float | None = None) -> Validation:
        """Every check of a load without loading, with what a load would need now."""
        with _named_errors():
            request = apb.ValidateAdapterRequest(adapter=adapter)
            return _core.validation_of(self._adapters.ValidateAdapter(request, **self._options(timeout_s)))

    def get_rollout(self, adapter: str, *, timeout_s: float | None = None) -> tuple[RolloutArm, ...]:
        """How calls for "tenant/adapter" are split between its tags, the stable tag first; () where they are not."""
        with _named_errors():
            request = apb.GetRolloutRequest(adapter=adapter)
            reply = self._adapters.GetRollout(request, **self._options(timeout_s))
            return _core.arms_of(reply.rollout)

    def resume_rollout(self, adapter: str, *, timeout_s: float | None = None) -> tuple[RolloutArm, ...]:
        """Let a canary that was rolled back have its share again; needs an admin's key."""
        with _named_errors():
            request = apb.ResumeRolloutRequest(adapter=adapter)
            reply = self._adapters.ResumeRollout(request, **self._options(timeout_s))
            return _core.arms_of(reply.rollout)

    def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether the server answers and serves (grpc.health.v1)."""
        check = self._channel.unary_unary(_core.HEALTH_METHOD, bytes, bytes)
        try:
            return bool(check(b"", timeout=timeout_s) == _core.HEALTH_SERVING)
        except grpc.RpcError:
            return False

    def close(self) -> None:
        """End the connection; running calls are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _options(self, timeout_s: float | None) -> dict[str, Any]:
        timeout = self._settings.timeout_s if timeout_s is None else timeout_s
        return {"timeout": timeout, "metadata": _core.call_metadata(self._settings)}


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as failed:
        raise _core.error_of(failed) from None
