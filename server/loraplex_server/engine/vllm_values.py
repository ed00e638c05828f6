"""Our plain values as vLLM's, and vLLM's outputs as ours; with `vllm_engine` all here that knows vLLM."""

import json
import math
from typing import Any

from loraplex_server.engine.choices import choice_grammar
from loraplex_server.engine.protocol import (
    LOGPROB_MIN,
    Candidate,
    EngineAdapter,
    EngineChunk,
    EngineEmbedding,
    Form,
    Sampling,
    TokenLogprobs,
)
from loraplex_server.errors import EngineUnavailableError, InvalidRequestError

_LOST = (
    "the answer came to where none of this base model's tokens may follow, or where finding those that may "
    "takes too long"
)


def lora_request(adapter: EngineAdapter, *, path: str = "") -> Any:
    """Return the adapter as vLLM names it, with its own path unless another is given."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(
        lora_name=adapter.name, lora_int_id=adapter.slot_id, lora_path=path or str(adapter.path)
    )


def sampling_params(sampling: Sampling) -> Any:
    """Return vLLM's sampling parameters. Choices are requests of their own here, so vLLM's `n` stays 1."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        structured_outputs=structured_outputs(sampling.form) if sampling.form else None,
        output_kind=RequestOutputKind.DELTA,
    )


def structured_outputs(form: Form) -> Any:
    """Return a form as vLLM's; a choice becomes a grammar."""
    from vllm.sampling_params import StructuredOutputsParams

    if form.kind == "json_schema":
        return StructuredOutputsParams(json=form.text)
    if form.kind == "regex":
        return StructuredOutputsParams(regex=form.text)
    text = choice_grammar(form.choices) if form.kind == "choice" else form.text
    return StructuredOutputsParams(grammar=text)


def refuse_unsupported(form: Form, *, field: str) -> None:
    """Refuse the parts of JSON Schema that the grammar library passes over in silence, as vLLM does.

    Raises:
        InvalidRequestError: names the field.
    """
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    if form.kind == "json_schema" and has_xgrammar_unsupported_json_features(json.loads(form.text)):
        raise InvalidRequestError(
            field,
            "asks for what cannot be kept to: uniqueItems, contains, multipleOf, several allOf, or the like",
        )


def lost(form: Form) -> InvalidRequestError:
    """The error of a request that its own form has ended."""
    return InvalidRequestError(f"sampling.structured_output.{form.kind}", _LOST)


def chunks(output: Any, sampling: Sampling) -> list[EngineChunk]:
    """Return what is new in a vLLM output of a request that had these parameters.

    Raises:
        InvalidRequestError: the form turned out to be one that cannot be followed.
        EngineUnavailableError: vLLM ended the request for another reason.
    """
    return [_chunk(part, output.num_cached_tokens or 0, sampling) for part in output.outputs]


def _chunk(part: Any, cached_tokens: int, sampling: Sampling) -> EngineChunk:
    if part.finish_reason not in (None, "stop", "length"):
        if part.finish_reason == "error" and sampling.form is not None:
            raise lost(sampling.form)
        raise EngineUnavailableError(f"the engine ended this request: {part.finish_reason}")
    asked = sampling.logprobs
    return EngineChunk(
        text=part.text,
        token_ids=tuple(part.token_ids),
        cached_tokens=cached_tokens,
        finish_reason=part.finish_reason,
        logprobs=()
        if asked is None
        else tuple(_logprobs(position, asked) for position in part.logprobs or ()),
    )


def _logprobs(position: Any, asked: int) -> TokenLogprobs:
    """Read one position: a mapping that begins with the token that was taken, then the likeliest ones.

    The taken one is among the likeliest where the mapping has no more entries than were asked for.
    """
    told = [
        Candidate(token_id, value.decoded_token or "", max(value.logprob, LOGPROB_MIN))
        for token_id, value in position.items()
    ]
    top = told if len(told) == asked else told[1:]
    ranks = {token_id: value.rank for token_id, value in position.items()}
    return TokenLogprobs(
        told[0].text, told[0].logprob, tuple(sorted(top, key=lambda each: ranks[each.token_id]))
    )


def embedding(output: Any) -> EngineEmbedding:
    """Return a vector of vLLM, its length brought to 1 in double precision.

    Raises:
        EngineUnavailableError: it has no length: the model's values are not numbers.
    """
    vector = output.outputs.data.double().tolist()
    length = math.sqrt(math.fsum(value * value for value in vector))
    if not 0 < length < math.inf:
        raise EngineUnavailableError("the engine gave a vector without a length")
    return EngineEmbedding(tuple(value / length for value in vector), output.num_cached_tokens or 0)
