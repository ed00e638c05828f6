"""Structured output as it is asked for: checked as far as that goes without a tokenizer. Pure.

Promises: what comes out is small, and a JSON Schema in it is an object of bounded depth that says nothing an answer
could not be kept to. Whether a schema, expression
or grammar means anything, and what it would cost, is found out by `form_trials`, where it can do no harm.
"""

import json
from typing import Any, Final

from loraplex_protos.v1 import generation_pb2 as pb
from loraplex_server.engine.protocol import Form
from loraplex_server.errors import InvalidRequestError
from loraplex_server.requests.schemas import check_schema

FORM_BYTES_MAX: Final = 65_536
SCHEMA_DEPTH_MAX: Final = 32
"""Objects and arrays inside one another. vLLM takes 64, OpenAI's API 10."""
CHOICES_MAX: Final = 256


def parse_form(message: pb.StructuredOutput, *, field: str) -> Form:
    """Check a form.

    Args:
        message: what the caller sent.
        field: how the caller names it.

    Raises:
        InvalidRequestError: empty, too large, too deep, or not of its kind's outward shape.
    """
    kind = message.WhichOneof("form")
    if kind is None:
        raise InvalidRequestError(field, "set one of json_schema, regex, grammar and choice")
    where = f"{field}.{kind}"
    texts = tuple(message.choice.texts) if kind == "choice" else (str(getattr(message, kind)),)
    if not 1 <= len(texts) <= CHOICES_MAX:
        raise InvalidRequestError(where, f"must hold 1 to {CHOICES_MAX} texts")
    if not all(texts):
        raise InvalidRequestError(where, "must not be empty")
    if sum(len(text.encode()) for text in texts) > FORM_BYTES_MAX:
        raise InvalidRequestError(where, f"must not be longer than {FORM_BYTES_MAX} bytes")
    if any("\0" in text for text in texts):
        raise InvalidRequestError(where, "must not contain a NUL character")
    if kind == "choice":
        return Form(kind, choices=texts)
    if kind == "json_schema":
        _check_schema(texts[0], where)
    if kind == "grammar" and not _is_ebnf(texts[0]):
        raise InvalidRequestError(where, "has no rule of the form name ::= expression")
    return Form(kind, texts[0])


def _check_schema(text: str, where: str) -> None:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidRequestError(where, "is not JSON") from None
    if not isinstance(schema, dict):
        raise InvalidRequestError(where, "must be a JSON object")
    level: list[Any] = [schema]
    for _ in range(SCHEMA_DEPTH_MAX):
        level = [child for node in level for child in _children(node)]
    if level:
        raise InvalidRequestError(where, f"is nested more than {SCHEMA_DEPTH_MAX} deep")
    check_schema(schema, field=where)


def _children(node: Any) -> list[Any]:
    """The objects and arrays directly inside one."""
    values = node.values() if isinstance(node, dict) else node
    return [value for value in values if isinstance(value, dict | list)]


def _refuse_constant(_name: str) -> Any:
    raise ValueError


def _is_ebnf(text: str) -> bool:
    """Whether there is a rule outside comments; vLLM would take anything else for a grammar of Lark's."""
    lines = (line.partition("#")[0].partition("//")[0] for line in text.split("\n"))
    return any("::=" in line for line in lines)
