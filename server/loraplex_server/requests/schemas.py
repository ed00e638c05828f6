"""The part of JSON Schema that an answer can be kept to. Pure.

The grammar library passes over what it does not know, and the answer would be called JSON of a schema that it breaks.
So what a schema may say is listed here, and everything else is refused by its place in the schema. `oneOf` is the one
exception: it is kept as `anyOf`, an answer fits one of its schemas, and may fit two. Found by trying every keyword out
with xgrammar 0.2.8; `tests/reliability/test_server_schemas.py` compares answers with a validator.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from loraplex_server.errors import InvalidRequestError

_TELLING: Final = frozenset(
    {
        *("$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "example"),
        *("examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    }
)
"""Says nothing about what fits."""
_WHOLE: Final = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")
"""Each says all that its schema says: the library passes over most of what stands beside it."""
_OF_TYPE: Final[Mapping[str, frozenset[str]]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"}),
    "object": frozenset(
        {
            *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
            *("minProperties", "maxProperties", "unevaluatedProperties"),
        }
    ),
}
_INNER: Final = (
    "items",
    "additionalProperties",
    "unevaluatedItems",
    "unevaluatedProperties",
    "propertyNames",
)
_INNER_LISTS: Final = ("prefixItems", "anyOf", "oneOf", "allOf")
_INNER_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions")
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def check_schema(schema: Mapping[str, Any], *, field: str) -> None:
    """Refuse a schema that says more than an answer can be kept to.

    Args:
        schema: of bounded depth.
        field: how the caller names it.

    Raises:
        InvalidRequestError: names the field, and the place in the schema.
    """
    for place, inner in _schemas(schema, "#"):
        problem = _problem(inner)
        if problem:
            raise InvalidRequestError(field, f"{place[:200]} {problem}"[:400])


def _schemas(schema: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema within one, itself first, each with its place."""
    if not isinstance(schema, dict):
        return  # true and false; anything else is refused by the library
    yield place, schema
    for key in _INNER:
        yield from _schemas(schema.get(key), f"{place}/{key}")
    for key in _INNER_LISTS:
        listed = schema.get(key)
        for number, inner in enumerate(listed if isinstance(listed, list) else ()):
            yield from _schemas(inner, f"{place}/{key}/{number}")
    for key in _INNER_MAPS:
        mapped = schema.get(key)
        for name, inner in mapped.items() if isinstance(mapped, dict) else ():
            yield from _schemas(inner, f"{place}/{key}/{name}")


def _problem(schema: Mapping[str, Any]) -> str | None:
    said = {key for key in schema if key not in _TELLING and not key.startswith("x-")}
    whole = [key for key in _WHOLE if key in said]
    if whole:
        return _problem_of_whole(schema, whole[0], beside=said - {whole[0]})
    types = _types(schema)
    allowed = {"type"}.union(*(_OF_TYPE.get(each, frozenset()) for each in types))
    if types - _OF_TYPE.keys():
        return "has an unknown type"
    if said - allowed:
        return f"says {_first(said - allowed)}, which an answer of this type cannot be kept to"
    of_text = sorted(said & {"format", "pattern"}) + sorted(said & {"minLength", "maxLength"})[:1]
    if len(of_text) > 1:
        return f"says {of_text[1]} beside {of_text[0]}; one of them would not be kept to"
    required, properties = schema.get("required") or [], schema.get("properties") or {}
    if not isinstance(required, list) or not isinstance(properties, dict):
        return "has required or properties of the wrong kind"
    if not all(isinstance(name, str) and name in properties for name in required):
        return "requires what is not among its properties"
    return None


def _problem_of_whole(schema: Mapping[str, Any], key: str, *, beside: Collection[str]) -> str | None:
    if key in ("enum", "const"):
        values = schema["enum"] if key == "enum" else [schema["const"]]
        types = _types(schema) if "type" in schema else _KINDS.keys()
        if not isinstance(values, list) or not all(_is_of(value, types) for value in values):
            return f"has values in {key} that are not of its type"
        beside = set(beside) - {"type"}
    if beside:
        return f"says {_first(beside)} beside {key}; one of them would not be kept to"
    if key == "$ref" and not str(schema["$ref"]).startswith("#"):
        return "refers to something outside itself: a $ref begins with #"
    if key == "allOf" and isinstance(schema["allOf"], list) and len(schema["allOf"]) > 1:
        return "has several schemas in allOf, which cannot be kept to together"
    return None


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema names; where it names none, those that its own words are about."""
    named = schema.get("type")
    if named is None:
        return {"object" for key in ("properties",) if key in schema} | {
            "array" for key in ("items", "prefixItems") if key in schema
        }
    return {str(each) for each in named} if isinstance(named, list) else {str(named)}


def _is_of(value: Any, types: Collection[str]) -> bool:
    kinds = [kind for each in types for kind in _KINDS.get(each, ())]
    return type(value) in kinds


def _first(words: Collection[str]) -> str:
    return min(words)[:64]
