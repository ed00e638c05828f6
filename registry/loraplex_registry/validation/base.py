"""The base model as the registry sees it: a name, a digest and a table of layer shapes.

A `BaseModel` is read from a checkpoint directory (only `config.json`, the safetensors *headers* and file hashes; no
tensor is decoded) or from its short form, the *base card*, a canonical JSON file named `base_model.json` that a
trainer leaves beside the adapter so that `push` needs no checkpoint.

Law: `BaseModel.from_json(base.to_json()) == base`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..errors import BaseMismatchError, InvalidReferenceError, SettingsError
from ..format.canonical import StrictJsonError, canonical, exact_object, parse
from ..refs import check_digest
from .safetensors_header import Header, HeaderError, TensorEntry, read_header

CARD_NAME: Final = "base_model.json"
"""File name of the base card inside an adapter directory."""

CARD_BYTES_MAX: Final = 16 << 20
"""Longest base card, in bytes (16 MiB; a 128-expert model needs about 3)."""

CONFIG_BYTES_MAX: Final = 4 << 20
"""Longest config.json of a base model, in bytes."""

LAYERS_MAX: Final = 200_000
"""Most layers in a table."""

HEADER_BYTES_MAX: Final = 100 << 20
"""Longest safetensors header of a checkpoint shard, in bytes: what the usual library allows for any file."""

_HASH_CHUNK_BYTES = 4 << 20
_MODULE = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_CARD_KEYS = frozenset({"fmt", "name", "digest", "vocab_size", "hidden_size", "max_position", "layers"})
_CARD_MARKS_MAX = {b"{": 1024, b"[": LAYERS_MAX + 1024, b":": LAYERS_MAX + 1024, b",": 2 * LAYERS_MAX + 1024}
_INT_MAX = 1 << 40

Progress = Callable[[str, int, int], None]
"""Called as (phase, done_bytes, total_bytes), from the thread that works, as often as a few times per MiB."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model that adapters are bound to.

    Attributes:
        name: for people only; never decides anything.
        digest: `sha256:` and the SHA-256 of the canonical JSON of {file name: SHA-256 hex} over config.json and
            every *.safetensors file of the checkpoint directory.
        layers: module name as in the checkpoint -> (in_features, out_features). An embedding stored as
            (vocabulary, hidden) appears as (hidden, vocabulary), like the output projection it may be tied to.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        max_position: longest context in tokens; 0 when the configuration does not say.
    """

    name: str
    digest: str
    layers: Mapping[str, tuple[int, int]]
    vocab_size: int
    hidden_size: int
    max_position: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    @classmethod
    def from_directory(
        cls, path: str | Path, *, name: str | None = None, progress: Progress | None = None
    ) -> BaseModel:
        """Read a Hugging Face checkpoint directory. Reads every byte once to hash it; decodes none.

        Args:
            path: directory with config.json and *.safetensors (links are followed: caches are made of links).
            name: name to carry; default the directory's name.
            progress: called with phase "hash base".

        Raises:
            SettingsError: the directory is not such a checkpoint.
        """
        directory = Path(path)
        files = _checkpoint_files(directory)
        config = _config(directory / "config.json")
        layers = _layer_table(
            [_shard_header(file) for file in files if file.suffix == ".safetensors"], config
        )
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
        return cls(
            name=name or directory.resolve().name,
            digest=_directory_digest(files, progress),
            layers=layers,
            vocab_size=_size(text, "vocab_size"),
            hidden_size=_size(text, "hidden_size", "n_embd", "d_model"),
            max_position=_size(text, "max_position_embeddings", "n_positions", "max_seq_len", default=0),
        )

    @classmethod
    def load(cls, path: str | Path, *, progress: Progress | None = None) -> BaseModel:
        """Read a checkpoint directory, an adapter directory holding a base card, or a base card file.

        Raises:
            SettingsError: the path is none of the three.
        """
        place = Path(path)
        card = place if place.is_file() else place / CARD_NAME
        if not card.is_file():
            return cls.from_directory(place, progress=progress)
        return cls.from_json(_read(card, CARD_BYTES_MAX))

    def to_json(self) -> bytes:
        """Return the base card, canonical JSON bytes."""
        return canonical(
            {
                "fmt": 1,
                "name": self.name,
                "digest": self.digest,
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "max_position": self.max_position,
                "layers": {module: list(shape) for module, shape in self.layers.items()},
            }
        )

    @classmethod
    def from_json(cls, body: bytes) -> BaseModel:
        """Read a base card.

        Raises:
            SettingsError: not a card of format 1.
        """
        try:
            if any(body.count(mark) > most for mark, most in _CARD_MARKS_MAX.items()):
                raise StrictJsonError("more values than a card has")  # seen before they take memory
            card = exact_object(parse(body, limit_bytes=CARD_BYTES_MAX), _CARD_KEYS)
            if type(card["fmt"]) is not int or card["fmt"] != 1:
                raise StrictJsonError("fmt is not 1")
            check_digest(_text(card["digest"]))
            return cls(
                name=_text(card["name"]),
                digest=card["digest"],
                layers=_card_layers(card["layers"]),
                vocab_size=_card_size(card["vocab_size"]),
                hidden_size=_card_size(card["hidden_size"]),
                max_position=_card_size(card["max_position"]),
            )
        except (StrictJsonError, InvalidReferenceError) as error:
            raise SettingsError(
                f"The base card {CARD_NAME} cannot be read ({error}); make it again from the base model's directory."
            ) from error

    def require(self, digest: str, *, what: str) -> None:
        """Raise BaseMismatchError unless this base has `digest`; `what` names the adapter in the message."""
        if digest != self.digest:
            raise BaseMismatchError(
                f"{what} was made for base {digest[:19]}…, this base is {self.name} {self.digest[:19]}…; "
                "use the base it was trained on or train it again."
            )


def _checkpoint_files(directory: Path) -> list[Path]:
    # `is_file` follows links and refuses pipes, which would block whoever opens them.
    files = sorted(filter(Path.is_file, directory.glob("*.safetensors")), key=lambda file: file.name)
    if not (directory / "config.json").is_file() or not files:
        raise SettingsError(
            f"{directory} is not a base model: it needs config.json and at least one .safetensors file, "
            f"or give the base card {CARD_NAME}."
        )
    return [directory / "config.json", *files]


def _config(path: Path) -> dict[str, Any]:
    body = _read(path, CONFIG_BYTES_MAX)
    try:
        config = parse(body, limit_bytes=CONFIG_BYTES_MAX)
    except StrictJsonError as error:
        raise SettingsError(f"{path} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise SettingsError(f"{path} cannot be read: not an object.")
    return config


def _read(path: Path, limit_bytes: int) -> bytes:
    """Return a file's bytes, one more than the limit at most."""
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes + 1)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> SettingsError:
    return SettingsError(f"{path} cannot be read ({error.strerror}).")


def _shard_header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            return read_header(
                file,
                header_bytes_max=HEADER_BYTES_MAX,
                tensors_max=1_000_000,
                metadata_bytes_max=HEADER_BYTES_MAX,
            )
    except HeaderError as error:
        raise SettingsError(f"{path} is not a safetensors file: {error}.") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _layer_table(headers: list[Header], config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Collect (in, out) of every 2-D weight, unpacking the two common 4-bit layouts and the tied output layer."""
    layers: dict[str, tuple[int, int]] = {}
    for header in headers:
        for tensor in header.tensors:
            found = _layer(tensor, config)
            if found is not None:
                layers[found[0]] = found[1]
    if config.get("tie_word_embeddings") and "lm_head" not in layers:
        for embedding in ("model.embed_tokens", "transformer.wte"):
            if embedding in layers:
                layers["lm_head"] = layers[embedding]
    return layers


def _layer(tensor: TensorEntry, config: dict[str, Any]) -> tuple[str, tuple[int, int]] | None:
    module, _, leaf = tensor.name.rpartition(".")
    if len(tensor.shape) != 2 or not _MODULE.fullmatch(module):
        return None
    rows, columns = tensor.shape
    if leaf == "weight" and tensor.dtype != "U8":  # U8 is bitsandbytes' packed form, which has lost its shape
        # GPT-2 stores its projections transposed (Conv1D), everybody else as (out, in).
        transposed = config.get("model_type") == "gpt2" and module.rpartition(".")[2] in {
            "c_attn",
            "c_proj",
            "c_fc",
        }
        return module, (rows, columns) if transposed else (columns, rows)
    if leaf == "qweight":
        return _packed_layer(module, rows, columns, config.get("quantization_config"))
    return None


def _packed_layer(module: str, rows: int, columns: int, how: object) -> tuple[str, tuple[int, int]] | None:
    """GPTQ packs 32/bits inputs into a row of int32; AWQ packs 32/bits outputs into a column."""
    if not isinstance(how, dict) or type(how.get("bits")) is not int or how["bits"] not in {2, 4, 8}:
        return None
    packed = 32 // how["bits"]
    method = how.get("quant_method")
    if method == "gptq":
        return module, (rows * packed, columns)
    return (module, (rows, columns * packed)) if method == "awq" else None


def _directory_digest(files: list[Path], progress: Progress | None) -> str:
    total = sum(file.stat().st_size for file in files)
    done = 0
    digests: dict[str, str] = {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress("hash base", done, total)
        digests[path.name] = digest.hexdigest()
    return "sha256:" + hashlib.sha256(canonical(digests)).hexdigest()


def _size(config: Any, *keys: str, default: int | None = None) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int and 0 < value < _INT_MAX:
            return value
    if default is None:
        raise SettingsError(f"config.json of the base model does not say {keys[0]}.")
    return default


def _text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
        raise StrictJsonError("a text is missing, too long or not printable")
    return value


def _card_size(value: object) -> int:
    if type(value) is not int or not 0 <= value < _INT_MAX:
        raise StrictJsonError("a size is not a whole number within range")
    return value


def _card_layers(value: object) -> dict[str, tuple[int, int]]:
    if not isinstance(value, dict) or len(value) > LAYERS_MAX:
        raise StrictJsonError("layers is not a table of acceptable length")
    layers = {}
    for module, shape in value.items():
        if not _MODULE.fullmatch(module) or not isinstance(shape, list) or len(shape) != 2:
            raise StrictJsonError("a row of layers is not a module name with two sizes")
        layers[module] = (_card_size(shape[0]), _card_size(shape[1]))
    return layers
