"""What goes into and comes out of calls: frozen dataclasses, no wire types."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ChatMessage:
    """One message; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class TokenIds:
    """A prompt given as token ids of the base model's tokenizer."""

    ids: tuple[int, ...]


# Raw text; or chat messages, rendered by the base model's chat template; or token ids.
Prompt = str | tuple[ChatMessage, ...] | TokenIds


@dataclass(frozen=True)
class JsonSchema:
    """The answer is JSON that this JSON Schema describes; a mapping, or its text."""

    schema: Mapping[str, Any] | str


@dataclass(frozen=True)
class Regex:
    """The answer as a whole matches this regular expression."""

    pattern: str


@dataclass(frozen=True)
class Grammar:
    """The answer is text of this grammar, in the EBNF of xgrammar; its first rule is `root`."""

    ebnf: str


@dataclass(frozen=True)
class OneOf:
    """The answer is one of these texts."""

    texts: tuple[str, ...]


# What an answer must look like.
Form = JsonSchema | Regex | Grammar | OneOf


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. None leaves the server's default, named in generation.proto.

    Attributes:
        n: completions of the same prompt; each counts as a call.
        logprobs: log-probabilities of each token and of so many likeliest ones.
        form: what the answer must look like.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    logprobs: int | None = None
    form: Form | None = None


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Header:
    """Who answers. `adapter` and `adapter_digest` are "" for the base model, `adapter_tag` is without a split."""

    request_id: str
    base_model: str
    base_digest: str
    adapter: str
    adapter_digest: str
    adapter_was_resident: bool
    adapter_tag: str = ""


@dataclass(frozen=True)
class Candidate:
    """A token that could have stood at a position; `text` may be part of a character."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one position; -9999 for a probability of 0.

    Attributes:
        text: of the token that stands there; may be part of a character.
        logprob: of that token.
        top: the likeliest ones, likeliest first.
    """

    text: str
    logprob: float
    top: tuple[Candidate, ...]


@dataclass(frozen=True)
class Delta:
    """One or more new tokens and the text they complete.

    Attributes:
        index: which of the completions they belong to.
        logprobs: one per token id, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens counted by the server."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds on the server, from the call's arrival."""

    adapter_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of the completions of an answer. `finish_reason` is "stop" or "length"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer. Its text, tokens and finish reason are those of the first choice; `usage` counts all."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    header: Header


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The vector of a prompt, of length 1 in the Euclidean norm."""

    vector: tuple[float, ...]
    usage: Usage
    timings: Timings
    header: Header


@dataclass(frozen=True)
class Tokens:
    """A prompt as the base model sees it, and how many tokens it takes of prompt and answer together."""

    ids: tuple[int, ...]
    context_tokens: int


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """One adapter version as the server sees it.

    Attributes:
        name: "tenant/adapter@sha256:<hex>".
        state: "absent", "fetching", "staged", "loading", "resident" or "draining".
    """

    name: str
    tenant: str
    adapter: str
    version: str
    digest: str
    state: str
    rank: int
    size_bytes: int
    pinned: bool
    active_requests: int


@dataclass(frozen=True, kw_only=True)
class AdapterCheck:
    """One check of `Validation`: "passed", "failed" or "not_made"; `reason` is what a load would end with."""

    name: str
    outcome: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a load would find.

    Attributes:
        checks: in the order in which a load makes them.
        adapter: None where a check failed before it was known.
        staged_bytes, slot_bytes: of memory, beside the engine and within it (reserved since the server's start).
        slot_at_once: whether it would get a slot without waiting for a call to end.
        evicts: whether another adapter would have to leave.
    """

    valid: bool
    checks: tuple[AdapterCheck, ...]
    adapter: AdapterInfo | None
    staged_bytes: int
    slot_bytes: int
    slot_at_once: bool
    evicts: bool


@dataclass(frozen=True, kw_only=True)
class RolloutArm:
    """One tag of a split, as one server sees it.

    Attributes:
        digest: "" where the tag is not set.
        weight: as configured; `share` of calls, 0 to 1, is what it gets now.
        completed, failed: calls in the window that is judged; a canary's failures are those it was replaced for, too.
        first_token_s, token_s: medians of that window in seconds, 0 before there are any.
        rolled_back: why it has no share any more, "" while it has.
    """

    tag: str
    digest: str
    weight: int
    share: float
    completed: int
    failed: int
    first_token_s: float
    token_s: float
    rolled_back: str


@dataclass(frozen=True, kw_only=True)
class LoadProgress:
    """A step of bringing an adapter in: resolve, verify, fetch, check, load, ready; `adapter` comes with ready."""

    phase: str
    done_bytes: int
    total_bytes: int
    elapsed_s: float
    adapter: AdapterInfo | None = None


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Encryption of the connection; every file is PEM.

    Attributes:
        ca: certificates of the issuers believed; "" for those of gRPC, which are the public web's.
        certificate, key: the client's own, where the server asks for one; both or none.
    """

    ca: str = ""
    certificate: str = ""
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class ConnectionSettings:
    """How to reach a server.

    Attributes:
        target: "host:port".
        api_key: sent with every call; None where the server asks for none. Never shown in repr.
        timeout_s: for calls that name none of their own.
        retries: how often `generate` tries again within its time when the server is away or has no room. All tries
            have one request id, so that the server generates once.
        tls: how the connection is encrypted; None for not at all.
        metadata: more metadata to send with every call.
    """

    target: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    retries: int = 0
    tls: Tls | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
