"""Random schemas that the server takes, answered at random as the engine would have it, judged by a validator."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from loraplex_examples.tiny_base import Recipe, ensure_tiny_base
from loraplex_server.errors import InvalidRequestError
from loraplex_server.requests.schemas import check_schema

pytestmark = pytest.mark.reliability

SCHEMAS = 3000
TOKENS_MAX = 400
ATOMS: list[dict[str, Any]] = [
    {"minLength": 1}, {"maxLength": 3}, {"pattern": "^[ab]+$"}, {"format": "date"}, {"minimum": 3}, {"maximum": 9},
    {"exclusiveMinimum": 2}, {"exclusiveMaximum": 11}, {"minItems": 1}, {"maxItems": 2}, {"minProperties": 1},
    {"maxProperties": 2}, {"required": ["a"]}, {"additionalProperties": False}, {"const": "a"}, {"const": 3},
    {"enum": ["a", 3, None]}, {"not": {"type": "string"}}, {"uniqueItems": True}, {"multipleOf": 2},
    {"$ref": "#/$defs/d"}, {"if": {"type": "string"}, "then": {"maxLength": 1}},
    {"dependentRequired": {"a": ["b"]}}, {"contains": {}},
    {"unevaluatedProperties": False}, {"unevaluatedItems": False}, {"title": "t"}, {"x-mine": 1},
]  # fmt: skip
TYPES = ["string", "integer", "number", "boolean", "null", "array", "object"]


def drawn(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema of anything, mostly sensible."""
    schema: dict[str, Any] = {}
    if rng.random() < 0.8:
        schema["type"] = rng.choice(TYPES) if rng.random() < 0.85 else rng.sample(TYPES, 2)
    for atom in rng.sample(ATOMS, rng.choice([0, 0, 1, 1, 2])):
        schema |= atom
    if depth and rng.random() < 0.5:
        inner = drawn(rng, depth - 1)
        schema |= rng.choice(
            [
                {"properties": {"a": inner, "b": {"type": "integer"}}},
                {"items": inner},
                {"prefixItems": [inner, {"type": "null"}]},
                {"anyOf": [inner, {"type": "integer"}]},
                {"allOf": [inner]},
                {"additionalProperties": inner},
                {"patternProperties": {"^k": inner}},
                {"propertyNames": {"pattern": "^[ab]+$"}},
            ]
        )
    return schema


def answered(
    library: Any, compiled: Any, size: int, stops: list[int], rng: random.Random
) -> list[int] | None:
    """Tokens drawn among those that the grammar allows; None where it does not come to an end."""
    import numpy as np

    matcher, mask, said = (
        library.GrammarMatcher(compiled),
        library.allocate_token_bitmask(1, size),
        list[int](),
    )
    for _ in range(TOKENS_MAX):
        matcher.fill_next_token_bitmask(mask, 0)
        allowed = np.flatnonzero(np.unpackbits(mask[0].numpy().view(np.uint8), bitorder="little")[:size])
        if not len(allowed):
            return None
        ending = [stop for stop in stops if stop in allowed]
        token = ending[0] if ending else int(rng.choice(list(allowed)))
        matcher.accept_token(token)
        if matcher.is_terminated():
            return said
        said.append(token)
    return None


def test_answers_of_every_schema_that_is_taken_are_valid_under_it(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import xgrammar
    from transformers import AutoTokenizer
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    seed = int(os.environ.get("LORAPLEX_SEED", random.SystemRandom().randrange(2**32)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(
        ensure_tiny_base(tmp_path, recipe=Recipe(steps=1, batch_rows=2))
    )
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    judged, wrong = 0, list[tuple[Any, str]]()
    for _ in range(SCHEMAS):
        schema = {**drawn(rng, 2), "$defs": {"d": {"type": "string", "maxLength": 2}}}
        try:
            check_schema(schema, field="f")
            if has_xgrammar_unsupported_json_features(schema):
                continue
            compiled = compiler.compile_json_schema(json.dumps(schema))
        except (InvalidRequestError, RuntimeError):
            continue
        for _ in range(3):
            tokens = answered(xgrammar, compiled, info.vocab_size, list(info.stop_token_ids), rng)
            if tokens is None:
                continue
            text = b"".join(info.decoded_vocab[token] for token in tokens).decode(errors="replace")
            value = json.loads(text, strict=False)
            judged += 1
            if not jsonschema.Draft202012Validator(schema).is_valid(value):
                wrong.append((schema, text))
    print(f"{judged} answers judged")
    assert judged > SCHEMAS / 10
    assert not wrong, wrong[:5]
