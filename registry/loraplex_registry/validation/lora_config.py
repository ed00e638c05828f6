"""`adapter_config.json`: what of PEFT's LoRA settings is accepted, and the small file an engine gets instead.

Engines drop settings they do not know without a word (vLLM filters by field name), so a setting that changes the
arithmetic and is not implemented would serve wrong numbers in silence. Hence the rule: every key must be known, every
value must be of its kind, and each setting that changes the arithmetic beyond plain LoRA must be at its neutral value.
An engine never sees the publisher's bytes: `AdapterConfig.to_json` writes a new file from the checked values.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import RankTooLargeError, UnsupportedAdapterError
from ..format.canonical import StrictJsonError, parse

CONFIG_NAME: Final = "adapter_config.json"
CONFIG_BYTES_MAX: Final = 64 << 10
"""Longest adapter_config.json, in bytes (64 KiB)."""

ALPHA_MAX: Final = 10_000.0
"""Largest lora_alpha."""

RANK_BOUND: Final = 1 << 31
"""No rank is even named beyond this; real limits are far below (`weights.Limits.max_rank`)."""

TARGETS_MAX: Final = 4096
"""Most entries of target_modules."""

PATTERNS_MAX: Final = 256
"""Most entries of rank_pattern and alpha_pattern together.

vLLM and PEFT compile a regular expression per entry and module. Python keeps 512 compiled ones; with more, every
module compiles every entry again: minutes in an engine that serves everybody, from a file of 64 KiB.
"""

_MODULE = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_MODULE_LENGTH_MAX = 256
# Initialisations after which a saved adapter is a plain LoRA on the unchanged base (vllm/lora/peft_helper.py 0.32).
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_. +*^$()|\[\]?\\-]{0,256}")
_PLAIN_DEPTH_MAX = 4
_PLAIN_ITEMS_MAX = 4096


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The checked settings of a plain LoRA adapter.

    Attributes:
        r: default rank, 1 or more.
        alpha: default lora_alpha; the update is scaled by alpha / rank, or alpha / sqrt(rank) with `rslora`.
        target_modules: suffixes of module names, sorted.
        rank_pattern, alpha_pattern: (module suffix, value) in the file's order; the first that matches wins.
        task_type: kept for PEFT, decides nothing here.
    """

    r: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    task_type: str | None = None

    @property
    def rank_max(self) -> int:
        """Largest rank any module may have."""
        return max([self.r, *(rank for _, rank in self.rank_pattern)])

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, by the rule PEFT and vLLM share: the first key that ends the name at a dot.

        Both take the key for a regular expression. Ours holds only name characters, so the one difference left is a
        dot that matches any character; it must match here too, or an engine would scale by another rank.
        """
        return ModuleRules(self).rank_of(module)

    def targets(self, module: str) -> bool:
        """Say whether target_modules covers a module."""
        return ModuleRules(self).targets(module)

    def to_json(self) -> bytes:
        """Return the adapter_config.json an engine or PEFT loads. Pattern order is kept because it has meaning."""
        return json.dumps(
            {
                "peft_type": "LORA",
                "task_type": self.task_type,
                "inference_mode": True,
                "r": self.r,
                "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
                "use_rslora": self.rslora,
                "target_modules": list(self.target_modules),
                "rank_pattern": dict(self.rank_pattern),
                "alpha_pattern": dict(self.alpha_pattern),
                "lora_dropout": 0.0,
                "bias": "none",
            },
            indent=1,
        ).encode("ascii")


class ModuleRules:
    """What the settings say of each module, prepared once for many modules; see `AdapterConfig.rank_of`."""

    def __init__(self, config: AdapterConfig) -> None:
        self._r = config.r
        self._targets = frozenset(config.target_modules)
        self._ranks = [(re.compile(rf"(?:.*\.)?{key}"), rank) for key, rank in config.rank_pattern]

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        for pattern, rank in self._ranks:
            if pattern.fullmatch(module):
                return rank
        return self._r

    def targets(self, module: str) -> bool:
        """Say whether target_modules covers a module: its name, or the end of it after a dot."""
        parts = module.split(".")
        return any(".".join(parts[start:]) in self._targets for start in range(len(parts)))


def read_config(body: bytes, *, rank_max: int) -> AdapterConfig:
    """Check an adapter_config.json as PEFT 0.21 writes it.

    Args:
        body: the file's bytes.
        rank_max: largest rank allowed.

    Raises:
        UnsupportedAdapterError: unreadable, an unknown key, or a setting beyond plain LoRA.
        RankTooLargeError: the rank, or one in rank_pattern, is above `rank_max`.
    """
    config = _parsed(body)
    for key in config:
        if key not in _KNOWN:
            _refuse(f"has the unknown key {key[:64]!a}{_why_unknown(key)}")
    for key, check in _KNOWN.items():
        if key in config and not check(config[key]):
            _refuse(
                f"has {key} = {_shown(config[key])}, which {_WHY.get(key, 'is not a plain LoRA setting')}"
            )
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if key not in config:
            _refuse(f"does not say {key}")
    patterns = len(config.get("rank_pattern") or {}) + len(config.get("alpha_pattern") or {})
    if patterns > PATTERNS_MAX:
        _refuse(f"has {patterns} entries in rank_pattern and alpha_pattern, the limit is {PATTERNS_MAX}")
    result = AdapterConfig(
        r=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora", False)),
        target_modules=tuple(sorted(set(config["target_modules"]))),
        rank_pattern=tuple((config.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple(
            (key, float(value)) for key, value in (config.get("alpha_pattern") or {}).items()
        ),
        task_type=config.get("task_type"),
    )
    if result.rank_max > rank_max:
        raise RankTooLargeError(
            f"The adapter has rank {result.rank_max}, the limit is {rank_max}; train it smaller."
        )
    return result


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        config = parse(body, limit_bytes=CONFIG_BYTES_MAX)
    except StrictJsonError as error:
        _refuse(f"cannot be read: {error}")
    if not isinstance(config, dict):
        _refuse("is not a JSON object")
    return config  # type: ignore[no-any-return]


def _refuse(what: str) -> None:
    raise UnsupportedAdapterError(f"{CONFIG_NAME} {what}; save a plain LoRA adapter with PEFT.")


def _why_unknown(key: str) -> str:
    if key in _CODE or key.startswith("custom_"):
        return ", which would run code"
    near = difflib.get_close_matches(key[:64], _KNOWN, n=1)
    return f" (nearest known: {near[0]!r})" if near else ""


def _shown(value: object) -> str:
    text = ascii(value) if not isinstance(value, str) else ascii(value[:64])
    return text if len(text) <= 60 else text[:57] + "..."


def _bool(value: object) -> bool:
    return isinstance(value, bool)


def _empty(value: object) -> bool:
    return value is None or value is False or value == [] or value == {}


def _plain(value: object, depth: int = 0) -> bool:
    """Say whether a value that is read and dropped is harmless: no address, no path, no deep or endless nest."""
    if value is None or isinstance(value, bool | int | float):
        return True
    if isinstance(value, str):
        return bool(_PLAIN_TEXT.fullmatch(value)) and ".." not in value
    if depth >= _PLAIN_DEPTH_MAX or not isinstance(value, list | dict) or len(value) > _PLAIN_ITEMS_MAX:
        return False
    items = value if isinstance(value, list) else [*value.keys(), *value.values()]
    return all(_plain(item, depth + 1) for item in items)


def _text_or_none(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 1024)


def _rank(value: object) -> bool:
    return type(value) is int and 1 <= value < RANK_BOUND


def _alpha(value: object) -> bool:
    # The bound comes first: a whole number of a thousand digits has no float.
    return type(value) in (int, float) and 0 < value <= ALPHA_MAX and math.isfinite(value)  # type: ignore[arg-type,operator]


def _dropout(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _release(value: object) -> bool:
    return value is None or (isinstance(value, str) and bool(re.fullmatch(r"[0-9A-Za-z.+_-]{1,64}", value)))


def _revision(value: object) -> bool:
    return value is None or (
        isinstance(value, str) and bool(re.fullmatch(r"[0-9A-Za-z._/-]{0,256}", value)) and "://" not in value
    )


def _module_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MODULE_LENGTH_MAX and bool(_MODULE.fullmatch(value))


def _modules(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= TARGETS_MAX and all(map(_module_name, value))


def _pattern(check: Callable[[object], bool]) -> Callable[[object], bool]:
    def matches(value: object) -> bool:
        if value is None:
            return True
        return isinstance(value, dict) and all(
            _module_name(key) and check(item) for key, item in value.items()
        )

    return matches


def _plain_init(value: object) -> bool:
    return (
        value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _PLAIN_INITS)
    )


def _task(value: object) -> bool:
    return value is None or (isinstance(value, str) and bool(re.fullmatch(r"[A-Z_]{1,32}", value)))


# Every key PEFT 0.21.2's LoraConfig writes, and those of older releases. Keys that only say how the adapter was
# made (dropout, initialisation data, the base's path) are read and dropped.
_KNOWN: Final[Mapping[str, Callable[[object], bool]]] = {
    "peft_type": lambda value: value == "LORA",
    "r": _rank,
    "lora_alpha": _alpha,
    "target_modules": _modules,
    "use_rslora": _bool,
    "rank_pattern": _pattern(_rank),
    "alpha_pattern": _pattern(_alpha),
    "task_type": _task,
    "bias": lambda value: value == "none",
    "init_lora_weights": _plain_init,
    "lora_dropout": _dropout,
    "fan_in_fan_out": _bool,
    "inference_mode": _bool,
    "peft_version": _release,
    "base_model_name_or_path": _text_or_none,  # PEFT writes the trainer's path; the base's digest decides, not this
    "revision": _revision,
    "megatron_core": lambda value: value in (None, "", "megatron.core"),
    "exclude_modules": _plain,
    "layers_to_transform": _plain,
    "layers_pattern": _plain,
    "eva_config": _plain,
    "lora_ga_config": _plain,
    "ensure_weight_tying": _bool,
    "qalora_group_size": _plain,
    **dict.fromkeys(
        (
            "alora_invocation_tokens",
            "arrow_config",
            "auto_mapping",
            "corda_config",
            "kasa_config",
            "layer_replication",
            "loftq_config",
            "lora_bias",
            "megatron_config",
            "modules_to_save",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_dora",
            "use_qalora",
            "velora_config",
        ),
        _empty,
    ),
}
_CODE: Final = frozenset({"auto_map", "trust_remote_code", "parent_library", "base_model_class"})
_WHY: Final[Mapping[str, str]] = {
    "peft_type": "is not LORA",
    "r": "is not a whole number of 1 or more",
    "lora_alpha": f"is not a number above 0 and up to {ALPHA_MAX:g}",
    "target_modules": "is not a list of module names (a pattern is refused: write the names out)",
    "rank_pattern": "is not a map of module names to ranks (write names, not regular expressions)",
    "alpha_pattern": "is not a map of module names to alphas (write names, not regular expressions)",
    "init_lora_weights": "changes the base model; convert the adapter to a plain LoRA first",
    "auto_mapping": "would import code",
    "megatron_core": "would import code",
    "modules_to_save": "ships whole layers; train LoRA weights only",
}
