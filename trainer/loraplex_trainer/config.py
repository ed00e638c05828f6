"""Settings of one training run: a YAML file of a few short sections, and `key=value` changes to it.

Promises: an unknown key is refused with the nearest known one; a value of the wrong type or out of range names
its key; the string under a field is its documentation.
"""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from loraplex_registry.encryption.key_providers import anchored_addresses
from loraplex_registry.signing.signers import is_signer_uri
from loraplex_trainer.errors import ConfigError

CONFIG_BYTES_MAX = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Shape of the adapter."""

    r: int = 16
    """Rank, 1 to 512."""
    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Of the adapter's input while training, 0 to below 1."""
    target: str | tuple[str, ...] = "all-linear"
    """Module names, or "all-linear" for every linear layer but the output."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One JSONL file of instruction data."""

    path: str
    """The file; relative to the settings file."""
    type: Literal["messages", "alpaca", "prompt_completion"] = "messages"
    """How its rows are read; see `data`."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The optimisation."""

    epochs: float = 1.0
    """Passes over the data; ignored when max_steps is set."""
    max_steps: int = 0
    """Optimizer steps; 0 leaves it to epochs."""
    micro_batch: int = 8
    """Rows in memory at the same time."""
    grad_accum: int = 1
    """Micro batches per optimizer step."""
    lr: float = 2e-4
    """Highest learning rate, reached after the warmup; then half a cosine to a tenth."""
    warmup: float = 0.05
    """Share of the steps, 0 to 1."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: unlimited."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the base model while training; the adapter itself is trained in fp32."""
    save_dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the adapter on disk."""
    seq_len: int = 512
    """Longest row in tokens; a longer one is refused, never cut."""
    seed: int = 0
    """Decides initial weights, row order and dropout."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Evaluation while training."""

    data: tuple[DataSource, ...] = ()
    """Held-out data; none: no evaluation."""
    every: int = 0
    """Steps between evaluations; 0: at the end only."""


@dataclass(frozen=True, kw_only=True)
class PublishSettings:
    """Where the finished adapter goes. Without `ref` it stays on disk.

    What is empty here is as the settings of the `registry` command say; what they alone can say holds as well.
    """

    ref: str = ""
    """ "tenant/adapter"."""
    registry: str = ""
    """file:///path or s3://bucket/prefix."""
    key: str = ""
    """Private signing key: a file (PEM), relative to the settings file, or a key service's address."""
    passphrase_file: str = ""
    """First line of this file opens the key, where it is encrypted."""
    tag: str = ""
    """Tag to move to the new version."""
    endpoint_url: str = ""
    """S3 servers other than AWS."""
    region: str = ""
    """AWS region."""
    encryption_key: str = ""
    """Keys as in `registry` settings: "file:acme.kek" (relative to the settings file), "awskms:…", "vault:…"."""
    audit: Literal["settings", "on", "off"] = "settings"
    """Whether the push is told in the tenant's audit log; "settings": as the `registry` command does."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    base_model: str
    """A Hugging Face id or a directory; "./name" is relative to the settings file."""
    output: str
    """Directory for the adapter; must not exist yet, or be empty. Relative to the settings file."""
    data: tuple[DataSource, ...]
    """Training data."""
    method: Literal["lora", "qlora"] = "lora"
    """lora: on the base as it is; qlora: on the base in NF4 with double quantization."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    publish: PublishSettings = field(default_factory=PublishSettings)


def load_config(path: Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a settings file and apply changes such as "train.lr=1e-3".

    Relative file names start at the settings file; in a change, at the working directory, as a shell completes them.

    Raises:
        ConfigError: unreadable, not YAML, or a setting is wrong.
    """
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(text) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path} is larger than {CONFIG_BYTES_MAX} bytes")
    document = _yaml(text, where=str(path))
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must be a mapping of settings")
    for change in changes:
        _apply(document, change)
    return parse_config(document, folder=path.parent)


def parse_config(document: Mapping[str, Any], *, folder: Path) -> TrainConfig:
    """Turn a parsed document into settings; relative file names start at `folder`.

    Raises:
        ConfigError: a setting is unknown, missing, of the wrong type or out of range.
    """
    config: TrainConfig = _build(TrainConfig, document, where="", folder=folder)
    _check(config)
    return config


def _apply(document: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"{change!r} is no change: write key=value, such as train.lr=1e-3")
    *sections, last = key.split(".")
    target = document
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{change!r}: {section} is not a section")
        target = inner
    value = _yaml(text, where=repr(change))
    target[last] = _located(value, key=key, folder=Path.cwd())


def _yaml(text: str | bytes, *, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


# Keys that name files. A base model is one only when it looks like one: anything else is a Hugging Face id.
_FILES = {"output", "publish.key", "publish.passphrase_file"}


def _located(value: Any, *, key: str, folder: Path) -> Any:
    if not isinstance(value, str) or not value:
        return value
    if key == "publish.encryption_key":
        return anchored_addresses(value, folder)
    if key == "publish.key" and is_signer_uri(value):
        return value
    is_file = key in _FILES or key.endswith("].path") or (key == "base_model" and value[0] == ".")
    return str(folder / value) if is_file else value


def _build(kind: Any, values: Any, *, where: str, folder: Path) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'settings'} must be a section")
    hints = get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise ConfigError(f"unknown setting {prefix}{key}; did you mean {prefix}{near[0]}?")
    built = {}
    for item in fields(kind):
        key = prefix + item.name
        if item.name in values:
            built[item.name] = _value(hints[item.name], values[item.name], key=key, folder=folder)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"setting {key} is required")
    return kind(**built)


def _value(kind: Any, value: Any, *, key: str, folder: Path) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if hasattr(kind, "__dataclass_fields__"):
        return _build(kind, value, where=key, folder=folder)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list")
        return tuple(
            _value(arguments[0], item, key=f"{key}[{n}]", folder=folder) for n, item in enumerate(value)
        )
    if origin is Literal:
        if type(value) is bool and {"on", "off"} <= set(
            arguments
        ):  # YAML reads a bare on or off as true or false
            value = "on" if value else "off"
        if value not in arguments:
            raise ConfigError(f"{key} must be one of {', '.join(arguments)}, not {value!r}")
        return value
    if origin is types.UnionType:  # a name or a list of names
        chosen = arguments[1] if isinstance(value, list) else arguments[0]
        return _value(chosen, value, key=key, folder=folder)
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as text
        value = _number(value, key)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} must be {kind.__name__}, not {value!r}")
    return _located(value, key=key, folder=folder)


def _number(text: str, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{key} must be a number, not {text!r}") from None


def _check(config: TrainConfig) -> None:
    lora, train = config.lora, config.train
    ranges: list[tuple[str, float, float, float]] = [
        ("lora.r", lora.r, 1, 512),
        ("lora.alpha", lora.alpha, 1e-3, 1e4),
        ("lora.dropout", lora.dropout, 0, 0.99),
        ("train.epochs", train.epochs, 1e-3, 1e4),
        ("train.max_steps", train.max_steps, 0, 10_000_000),
        ("train.micro_batch", train.micro_batch, 1, 4096),
        ("train.grad_accum", train.grad_accum, 1, 4096),
        ("train.lr", train.lr, 1e-8, 1),
        ("train.warmup", train.warmup, 0, 1),
        ("train.clip", train.clip, 0, 1e4),
        ("train.seq_len", train.seq_len, 2, 1_000_000),
        ("train.seed", train.seed, 0, 2**32 - 1),
        ("eval.every", config.eval.every, 0, 10_000_000),
    ]
    for key, value, low, high in ranges:
        if not low <= value <= high:
            raise ConfigError(f"{key} must be from {low:g} to {high:g}, not {value:g}")
    if not config.data:
        raise ConfigError("data must name at least one file")
