"""The engine: vLLM's AsyncLLM with one quantized base model, and LoRA on where there is a registry.

Promises: the base is in memory once, whatever the number of adapters; adapters enter by `load` alone, before a
request names them (a lazy load that fails inside a step ends vLLM for everybody); on CPU it refuses to start
unless a correct LoRA wrapper is really in the model's layers; vLLM never evicts on its own, because it is
never given more adapters than it has slots, or keeps them beside its slots. With `vllm_adapters`, `vllm_settings` and
`vllm_values` all here that knows vLLM.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_registry.errors import SettingsError
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.checkpoint import checkpoint_directory
from loraplex_server.config import Config
from loraplex_server.engine.beat import Beat
from loraplex_server.engine.form_trials import FormTrials, sandbox_command
from loraplex_server.engine.protocol import (
    ChatTurn,
    EngineAdapter,
    EngineChunk,
    EngineEmbedding,
    EngineEmbedRequest,
    EngineRequest,
    Form,
    Sampling,
)
from loraplex_server.engine.quantize import int8_checkpoint
from loraplex_server.engine.vllm_adapters import Loading, Staged, ThroughEngine
from loraplex_server.engine.vllm_settings import (
    engine_arguments,
    model_is_apart,
    set_environment,
    widen_slots,
)
from loraplex_server.engine.vllm_values import (
    chunks,
    embedding,
    lost,
    refuse_unsupported,
    sampling_params,
)
from loraplex_server.errors import (
    AdapterNotReadyError,
    ConfigError,
    EngineUnavailableError,
    InvalidRequestError,
)
from loraplex_server.vllm_plugin import CORRECT_WRAPPERS, NATIVE_WRAPPER

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_log = logging.getLogger(__name__)
START_POLL_S = 0.1


LOSSES_MAX = (
    3  # requests of a tenant that a form may end before it is refused: where an answer goes is chance
)
LOST_FORMS_MAX = 1024  # forms remembered for that


class VllmEngine:
    """See `protocol.Engine`. Start it inside the event loop that will use it."""

    def __init__(self, config: Config, *, cache_dir: Path) -> None:
        self._config = config
        self._cache_dir = cache_dir
        self._llm: AsyncLLM | None = None
        self._loading: Loading | None = None
        self._starting: asyncio.Future[AsyncLLM] | None = None
        self._base: BaseModel | None = None
        self._tokenizer: Any = None
        self._trials: FormTrials | None = None
        # How often a form has ended a tenant's request, by cache salt (one for each tenant) and form.
        self._losses: OrderedDict[tuple[str, Form], int] = OrderedDict()
        # One thread: Hugging Face tokenizers are not to be shared between threads.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._context_tokens = 0
        self._vocab_size = 0
        self._beat = Beat(config.server.stream_interval_ms / 1000)

    @property
    def base(self) -> BaseModel:
        """See `Engine.base`."""
        assert self._base is not None, "start() first"
        return self._base

    @property
    def context_tokens(self) -> int:
        """See `Engine.context_tokens`."""
        return self._context_tokens

    @property
    def vocab_size(self) -> int:
        """See `Engine.vocab_size`."""
        return self._vocab_size

    @property
    def task(self) -> str:
        """See `Engine.task`."""
        return self._config.model.task

    async def start(self) -> None:
        """Load the base model.

        Raises:
            ConfigError: the model cannot be found or described.
            EngineUnavailableError: vLLM did not come up, or would serve wrong answers.
        """
        try:
            directory = await asyncio.to_thread(checkpoint_directory, self._config.model.path)
            self._base = await asyncio.to_thread(
                BaseModel.from_directory, directory, name=self._config.model.name
            )
        except SettingsError as error:
            raise ConfigError(f"model.path: {error}") from error
        self._tokenizer = await asyncio.to_thread(_load_tokenizer, directory)
        served = directory
        if self._config.model.quantization == "int8":
            served = await asyncio.to_thread(
                int8_checkpoint, directory, digest=self._base.digest, cache_dir=self._cache_dir
            )
        await self._start_vllm(served)
        if self._config.serves_adapters:
            await self._refuse_wrong_lora()
            self._loading = await self._way_in()
        self._trials = FormTrials(sandbox_command(directory, self._vocab_size))
        if self.task == "generate":
            await self._warm_up()

    async def _warm_up(self) -> None:
        """Have vLLM make now what it would make within a step, when log-probabilities are first asked for."""
        sampling = Sampling(max_tokens=1, temperature=0, logprobs=1)
        request = EngineRequest(
            request_id="warm-up", prompt_ids=(0,), sampling=sampling, adapter=None, cache_salt="warm-up"
        )
        async for _ in self.generate(request):
            pass

    async def _start_vllm(self, directory: Path) -> None:
        """Start vLLM on a thread: it takes tens of seconds, in which probes, refusals and signals go on."""
        self._starting = asyncio.ensure_future(asyncio.to_thread(self._make_llm, directory))
        try:
            self._llm = llm = await asyncio.shield(self._starting)
            # It begins to listen to its engine core with the first question that is asked in this loop.
            await llm.collective_rpc("loraplex_memory")
        except Exception as error:
            raise EngineUnavailableError(
                f"vLLM could not start {self._config.model.path}: {error}"
            ) from error
        self._context_tokens = llm.model_config.max_model_len
        self._vocab_size = llm.model_config.get_vocab_size()

    def _make_llm(self, directory: Path) -> "AsyncLLM":
        set_environment(self._config)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**engine_arguments(self._config, directory, self.base))
        vllm_config = arguments.create_engine_config()
        widen_slots(vllm_config)
        return AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=False)

    async def _way_in(self) -> Loading:
        """Return how adapters come in: staged by the worker where it can, through the engine loop otherwise."""
        if model_is_apart() or not await self._is_native():
            return ThroughEngine(self._vllm)
        cache = self._config.adapters.cache_dir or self._cache_dir / "adapters"
        return await Staged.open(self._vllm, pid=os.getpid(), roots=[str(cache)])

    async def _is_native(self) -> bool:
        wrappers: list[str] = await self._vllm.collective_rpc("loraplex_lora_wrapper")
        return wrappers == [NATIVE_WRAPPER]

    async def _refuse_wrong_lora(self) -> None:
        """On CPU, ask every worker which LoRA wrapper its layers hold, and stop unless it is one of ours."""
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        for wrapper in await self._vllm.collective_rpc("loraplex_lora_wrapper"):
            if wrapper not in CORRECT_WRAPPERS:
                await self.close()
                raise EngineUnavailableError(
                    f"LoRA on CPU would run through {wrapper or 'nothing'}, which mixes tenants' rows; is the "
                    "vLLM plugin 'loraplex' switched off (VLLM_PLUGINS, LORAPLEX_CPU_LORA)?"
                )

    @property
    def _vllm(self) -> "AsyncLLM":
        if self._llm is None:
            raise EngineUnavailableError("the engine is not running", retry_after_s=5.0)
        return self._llm

    @property
    def _adapters(self) -> Loading:
        if self._loading is None:
            raise EngineUnavailableError("the engine is not running", retry_after_s=5.0)
        return self._loading

    @property
    def keeps_bytes(self) -> bool:
        """See `Engine.keeps_bytes`."""
        return self._loading is not None and self._loading.keeps_bytes

    async def encode_text(self, text: str) -> list[int]:
        """See `Engine.encode_text`."""
        return await self._in_tokenizer(lambda: self._tokenizer(text)["input_ids"])

    async def encode_chat(self, turns: tuple[ChatTurn, ...]) -> list[int]:
        """See `Engine.encode_chat`."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        if not self._tokenizer.chat_template:
            raise InvalidRequestError("chat", "this base model has no chat template; send text")

        def encode() -> list[int]:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids: list[int] = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
            return ids

        from jinja2 import TemplateError

        try:
            return await self._in_tokenizer(encode)
        except TemplateError as error:
            raise InvalidRequestError("chat.messages", f"the chat template refused them: {error}") from None

    async def _in_tokenizer(self, work: Any) -> list[int]:
        ids: list[int] = await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        return ids

    async def check_form(self, form: Form, *, tenant: str) -> None:
        """See `Engine.check_form`."""
        assert self._trials is not None, "start() first"
        field = f"sampling.structured_output.{form.kind}"
        refuse_unsupported(form, field=field)
        await self._trials.check(form, tenant=tenant, field=field)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """See `Engine.generate`."""
        from vllm.inputs.engine import tokens_input

        form = request.sampling.form
        if form is not None and self._losses.get((request.cache_salt, form), 0) >= LOSSES_MAX:
            raise lost(form)
        llm, collector, finished = self._vllm, None, False
        try:
            with _named_errors():
                # As `AsyncLLM.generate` does it, without its generator; input that says its type is not rendered on a
                # thread first.
                collector = await llm.add_request(
                    request.request_id,
                    tokens_input(list(request.prompt_ids), cache_salt=request.cache_salt),
                    sampling_params(request.sampling),
                    lora_request=self._adapters.request(request.adapter) if request.adapter else None,
                )
                while not finished:
                    output = collector.get_nowait() or await collector.get()
                    finished = output.finished
                    try:
                        parts = self._chunks(output, request)
                    except EngineUnavailableError:
                        await self._require(request.adapter)
                        raise
                    for chunk in parts:
                        yield chunk
                    if not finished:
                        await self._beat.next()  # meanwhile the collector joins what comes
        finally:
            if collector is not None and not finished:
                await llm.abort(collector.request_id, internal=True)

    def _chunks(self, output: Any, request: EngineRequest) -> list[EngineChunk]:
        try:
            return chunks(output, request.sampling)
        except InvalidRequestError:
            form = request.sampling.form
            if form is not None:
                key = request.cache_salt, form
                self._losses[key] = self._losses.pop(key, 0) + 1
                if len(self._losses) > LOST_FORMS_MAX:
                    self._losses.popitem(last=False)
            raise

    async def _require(self, adapter: EngineAdapter | None) -> None:
        """Say so if the engine does not hold an adapter that a request names; `Residency.audit` will see it too.

        Raises:
            AdapterNotReadyError: that is why.
        """
        if adapter is not None and self.keeps_bytes and adapter.slot_id not in await self.loaded():
            raise AdapterNotReadyError(f"the engine has lost {adapter.name}; ask again", retry_after_s=1.0)

    async def embed(self, request: EngineEmbedRequest) -> EngineEmbedding:
        """See `Engine.embed`."""
        from vllm.pooling_params import PoolingParams

        # First: where the engine core ends such a request by itself, vLLM's front end takes it for a bug and ends.
        await self._require(request.adapter)
        with _named_errors():
            outputs = self._vllm.encode(
                {"prompt_token_ids": list(request.prompt_ids), "cache_salt": request.cache_salt},
                PoolingParams(task="embed"),
                request.request_id,
                lora_request=self._adapters.request(request.adapter) if request.adapter else None,
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    return embedding(output)
        raise EngineUnavailableError("the engine gave no vector")

    async def load(self, adapter: EngineAdapter) -> int:
        """See `Engine.load`."""
        return await self._adapters.load(adapter)

    async def unload(self, slot_id: int) -> None:
        """See `Engine.unload`."""
        await self._adapters.unload(slot_id)

    async def loaded(self) -> frozenset[int]:
        """See `Engine.loaded`."""
        return await self._adapters.loaded() if self._config.serves_adapters else frozenset()

    async def check(self) -> None:
        """See `Engine.check`."""
        if self._vllm.errored:
            raise EngineUnavailableError("the engine stopped", retry_after_s=5.0)

    async def worker_memory(self) -> list[dict[str, int]]:
        """Memory of each worker process in bytes: `rss`, `peak_rss`, `pss`."""
        answer: list[dict[str, int]] = await self._vllm.collective_rpc("loraplex_memory")
        return answer

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._trials is not None:
            await self._trials.close()
        loading, self._loading = self._loading, None
        if loading is not None:
            await loading.close()
        llm, self._llm = self._llm, None
        if llm is None and self._starting is not None:
            llm = await _ended(self._starting)
        self._starting = None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)
        self._tokenizing.shutdown(wait=False)


async def _ended(starting: "asyncio.Future[AsyncLLM]") -> "AsyncLLM | None":
    """End a start that nobody waits for any more, and return what came of it all the same."""
    while not starting.done():
        for child in (
            multiprocessing.active_children()
        ):  # the engine core, as soon as there is one: the start fails then
            child.kill()
        await asyncio.wait([starting], timeout=START_POLL_S)
    return None if starting.cancelled() or starting.exception() is not None else starting.result()


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """Turn vLLM's errors about one request into ours."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except EngineDeadError:
        raise EngineUnavailableError("the engine stopped", retry_after_s=5.0) from None
    except VLLMClientError as error:
        raise InvalidRequestError("sampling", str(error)) from None
    except EngineGenerateError as error:
        raise EngineUnavailableError("the engine failed this request", retry_after_s=1.0) from error


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
