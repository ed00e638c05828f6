"""Whose call it is, what answers it, and its times: one account per call, from its admission to its outcome.

What is learnt is told at once: to the metrics, under the labels of tenant and adapter; to the call's journey, which the
access log and traces read; at the end to the canary's judge.
"""

import time

from loraplex_server.adapters.versions import AdapterVersion
from loraplex_server.calls.gate import Backend
from loraplex_server.metrics import CallMetrics, Metrics
from loraplex_server.observability.journey import Journey
from loraplex_server.rollout.rollouts import Pick
from loraplex_server.rollout.splits import Target


class Account:
    """Whose call it is, what answers it, and its times; tells the metrics as it goes, and the call's journey.

    Attributes:
        pick: the adapter's version that answers; None for the base model, and until it is known.
        answered: by digest the versions that were leased; several where completions went over to the stable one.
        last: when the engine gave something last, of `time.monotonic`.
        adapter_s: seconds from arrival until the adapter was leased; 0 for the base model.
    """

    def __init__(self, metrics: Metrics, journey: Journey) -> None:
        self.pick: Pick | None = None
        self.answered: dict[str, AdapterVersion] = {}
        self.last = journey.arrived
        self.adapter_s = 0.0
        self._metrics = metrics
        self._journey = journey
        self._counted: CallMetrics | None = None
        self._first_token_s: float | None = None
        self._tokens = 0

    @property
    def tenant(self) -> str:
        """Who is served, and pays."""
        return self._journey.tenant

    @property
    def counted(self) -> CallMetrics:
        """Where the call is counted; after `serves`."""
        assert self._counted is not None, "serves() first"
        return self._counted

    @property
    def total_s(self) -> float:
        """Seconds from arrival to the last thing the engine gave."""
        return self.last - self._journey.arrived

    @property
    def first_token_s(self) -> float:
        """Seconds from arrival to the first token of any completion; 0 before it."""
        return self._first_token_s or 0.0

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt answered from the prefix cache, as the first token told."""
        return self._journey.cached_tokens

    def asks(self, operation: str, adapter: Target | None, backend: Backend) -> None:
        """This is what the call wants: see `Journey` for the operations."""
        journey = self._journey
        journey.operation = operation
        journey.model = backend.model_name if adapter is None else str(adapter)
        journey.base_digest = backend.engine.base.digest

    def serves(self, pick: Pick | None) -> None:
        """This is what answers; None for the base model. From now on everything is counted under its labels."""
        journey, adapter = self._journey, ""
        if pick is not None:
            self.pick, version = pick, pick.version
            self._metrics.resolved(time.monotonic() - journey.stages[-1][1])
            journey.tenant, adapter = version.tenant, f"{version.tenant}/{version.adapter}"
            self.serves_instead(version)
        self._counted = self._metrics.call(journey.tenant, adapter)

    def serves_instead(self, version: AdapterVersion) -> None:
        """This is the version of the adapter that answers."""
        self._journey.adapter, self._journey.adapter_digest = version.name, version.digest

    def adapter_ready(self, version: AdapterVersion, *, was_resident: bool) -> None:
        """A version of the adapter is leased; counted when it is so for the first time."""
        self.answered[version.digest] = version
        if not self.adapter_s:
            self.adapter_s = time.monotonic() - self._journey.arrived
            self._metrics.adapter_ready(self.adapter_s, was_resident=was_resident)
            self.counted.adapter_ready()

    def prompted(self, tokens: int) -> None:
        """The prompt, or all prompts, have so many tokens."""
        self._journey.prompt_tokens = tokens

    def prompt_seen(self, tokens: int) -> None:
        """A prompt of so many tokens went to the engine, once for each completion."""
        self.counted.prompt_seen(tokens)

    def tokens(self, count: int, now: float, *, since: float, cached_tokens: int) -> None:
        """Tokens of a completion came from the engine.

        Args:
            count: how many, 1 or more.
            now: when.
            since: when the ones before of the same completion came; 0 for its first.
            cached_tokens: of the prompt.
        """
        if self._first_token_s is None:
            self._first_token_s = now - self._journey.arrived
            self._journey.first_token, self._journey.cached_tokens = now, cached_tokens
            self.counted.first_token(self._first_token_s, tokens=count, cached_tokens=cached_tokens)
        elif since:
            self.counted.more_tokens(now - since, count)
        else:
            self.counted.generated(count)
        self.last = now
        self._tokens += count

    def finished(self, reasons: tuple[str, ...]) -> None:
        """The completions came to their ends."""
        self._journey.finish_reasons = reasons

    def completed(self) -> None:
        """The call ended well; a canary is judged by the times of single completions."""
        if self.pick is None or self._first_token_s is None:
            return
        alone = self._tokens > 1 and len(self._journey.finish_reasons) == 1
        token_s = (self.total_s - self._first_token_s) / (self._tokens - 1) if alone else None
        self.pick.completed(first_token_s=self._first_token_s, token_s=token_s)

    def failed(self, error: BaseException) -> None:
        """The call ended in an error."""
        if self.pick is not None:
            self.pick.failed(error)

    def ended(self, outcome: str) -> None:
        """The call ended in one of `metrics.OUTCOMES`."""
        self._journey.output_tokens = self._tokens
        self._metrics.request_ended(self._counted, self.tenant, outcome, self.total_s)
