"""From a directory as a trainer or a download leaves it to one that holds an adapter and nothing else.

Of the many files that lie beside an adapter (tokenizers, optimizer states, checkpoints, logs) the two that matter are
copied, with README.md, LICENSE and the base card; for each of the others the report says why it was left behind. The
settings are copied as they are, but for one thing: `target_modules` written as a pattern becomes the list of modules
that the weights file holds weights for. That is what the pattern selected when the adapter was trained, and no
stranger's regular expression has to be run to find it out.

Nothing is judged here that `validate_adapter` judges, and nothing is unpickled, ever.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import UnsupportedAdapterError
from ..format.canonical import StrictJsonError, parse
from ..validation.base import CARD_NAME, BaseModel
from ..validation.lora_config import CONFIG_BYTES_MAX, CONFIG_NAME, TARGETS_MAX
from ..validation.safetensors_header import HeaderError, read_header
from ..validation.weights import TEXT_BYTES_MAX, WEIGHTS_NAME, Limits, open_regular, read_small

ENTRIES_MAX: Final = 10_000
"""Most entries of a directory that are looked at."""

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?:embedding_)?A(?:\.weight)?")
_LICENSE = re.compile(r"LICENSE(?:\.(?:md|txt))?")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+|epoch[-_]?[0-9]+|step[-_]?[0-9]+")
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template\..*|spiece\.model"
)
_TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|rng_state.*|scaler)\.(bin|pt|pth)|trainer_state\.json|all_results\.json|"
    r"(train|eval)_results\.json|runs|wandb|events\.out\..*|.*\.log"
)


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` did.

    Attributes:
        copied: names of the files copied.
        left: (name, why) of everything that was left behind, at most ENTRIES_MAX.
        changed: what was written otherwise than it was found, in sentences.
        trained_on: the base as the settings name it, unverified; None when they do not.
    """

    copied: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    changed: tuple[str, ...]
    trained_on: str | None


def collect(source: Path, target: Path, base: BaseModel, limits: Limits | None = None) -> Collected:
    """Copy an adapter out of a directory full of other things.

    Args:
        source: the directory; links are followed within it, and within the cache of Hugging Face it is part of.
        target: an existing empty directory.
        base: the base it was trained on, for the layer names.
        limits: bounds what is copied; default `Limits()`.

    Raises:
        UnsupportedAdapterError: there is no adapter in safetensors; the sentence says what to do.
    """
    limits = limits or Limits()
    names = _names(source)
    _require_adapter(source, names)
    copied, left = [CONFIG_NAME, WEIGHTS_NAME], []
    for name in names:
        if name in copied:
            continue
        why = _why_left(source, name)
        if why is None:
            copied.append(name)
        else:
            left.append((name, why))
    for name in copied:
        _copy(_inside(source, name), target / name, limit_bytes=_limit(name, limits))
    changed, trained_on = _tidy_config(target, base, limits)
    return Collected(tuple(copied), tuple(left), changed, trained_on)


def _names(source: Path) -> list[str]:
    try:
        with os.scandir(source) as entries:
            found = [entry.name for _, entry in zip(range(ENTRIES_MAX + 1), entries, strict=False)]
    except OSError as error:
        raise UnsupportedAdapterError(
            f"{source} cannot be read as a directory ({error.strerror})."
        ) from error
    if len(found) > ENTRIES_MAX:
        raise UnsupportedAdapterError(
            f"{source} holds more than {ENTRIES_MAX} entries; name the adapter's own."
        )
    return sorted(found)


def _require_adapter(source: Path, names: list[str]) -> None:
    """Refuse a directory without an adapter in safetensors, with what to do instead."""
    if CONFIG_NAME in names and WEIGHTS_NAME in names:
        return
    pickled = [name for name in names if name.startswith("adapter_model") and name.endswith(_PICKLES)]
    if WEIGHTS_NAME not in names and pickled:
        raise UnsupportedAdapterError(
            f"{source} holds its weights as a pickle only ({pickled[0][:64]!a}), which can run code when it is opened; "
            "where you trust its maker, load it with PEFT offline and save it with "
            "save_pretrained(DIR, safe_serialization=True)."
        )
    inner = [name for name in names if (source / name / WEIGHTS_NAME).is_file()]
    if inner:
        raise UnsupportedAdapterError(
            f"{source} holds its adapters in {', '.join(map(ascii, inner[:4]))}; name one of these directories."
        )
    if "model.safetensors" in names or "model.safetensors.index.json" in names:
        raise UnsupportedAdapterError(
            f"{source} holds a whole model, not an adapter; give it as --base to an adapter trained on it."
        )
    missing = CONFIG_NAME if CONFIG_NAME not in names else WEIGHTS_NAME
    raise UnsupportedAdapterError(f"{source} lacks {missing}; save the adapter with PEFT's save_pretrained.")


def _why_left(source: Path, name: str) -> str | None:
    """Return why a file is left behind; None for one that goes with the adapter."""
    kind = (
        "a directory"
        if (source / name).is_dir()
        else "belongs to the tokenizer, which comes with the base"
        if _TOKENIZER.fullmatch(name)
        else "state of the training, not of the adapter"
        if _TRAINING.fullmatch(name)
        else "may hold pickled code"
        if name.lower().endswith(_PICKLES)
        else None
    )
    if kind == "a directory" and _CHECKPOINT.fullmatch(name):
        return "an earlier checkpoint; import it on its own"
    if kind == "a directory" and name == ".git":
        return "history of the repository"
    if kind is not None:
        return kind
    if name != "README.md" and name != CARD_NAME and not _LICENSE.fullmatch(name):
        return "no part of an adapter"
    size = _inside(source, name).stat().st_size
    if name != CARD_NAME and not 0 < size <= TEXT_BYTES_MAX:
        return f"empty, or longer than {TEXT_BYTES_MAX} bytes"
    return None


def _inside(source: Path, name: str) -> Path:
    """Return where a file really is.

    The cache of Hugging Face is made of links from `snapshots/<revision>/` to `blobs/`. Any other link that leads out
    of the directory is refused: a downloaded README.md that is a link to a private key must not be published.
    """
    home = source.resolve()
    real = (home / name).resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed) or not real.is_file():
        raise UnsupportedAdapterError(
            f"{name[:64]!a} in {source} is a link that leads elsewhere, or no file; replace it by a copy."
        )
    return real


def _limit(name: str, limits: Limits) -> int:
    return {WEIGHTS_NAME: limits.max_bytes, CONFIG_NAME: CONFIG_BYTES_MAX, CARD_NAME: 16 << 20}.get(
        name, TEXT_BYTES_MAX
    )


def _copy(source: Path, target: Path, *, limit_bytes: int) -> None:
    with open_regular(source) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
            raise UnsupportedAdapterError(
                f"{target.name} has {status.st_size} bytes, the limit is {limit_bytes}."
            )
        with target.open("xb") as sink:
            shutil.copyfileobj(file, sink, 4 << 20)


def _tidy_config(directory: Path, base: BaseModel, limits: Limits) -> tuple[tuple[str, ...], str | None]:
    """Replace a pattern in target_modules by names; return what was changed and the base the settings name."""
    try:
        config = parse(read_small(directory / CONFIG_NAME, limit_bytes=CONFIG_BYTES_MAX))
    except StrictJsonError as error:
        raise UnsupportedAdapterError(
            f"{CONFIG_NAME} cannot be read: {error}; save the adapter with PEFT again."
        ) from error
    if not isinstance(config, dict):
        raise UnsupportedAdapterError(
            f"{CONFIG_NAME} is not a JSON object; save the adapter with PEFT again."
        )
    trained_on = config.get("base_model_name_or_path")
    changed: tuple[str, ...] = ()
    if isinstance(config.get("target_modules"), str):
        modules = _shortest(_modules(directory / WEIGHTS_NAME, limits), base)
        changed = (
            f"target_modules: the pattern {_shown(config['target_modules'])} is now the {len(modules)} names of the "
            f"modules with weights: {_shown(', '.join(modules))}",
        )
        config["target_modules"] = modules
        _write_config(directory / CONFIG_NAME, config)
    return changed, trained_on[:256] if isinstance(trained_on, str) else None


def _write_config(path: Path, config: dict[str, Any]) -> None:
    body = json.dumps(config, indent=2).encode("ascii")
    if len(body) > CONFIG_BYTES_MAX or len(config["target_modules"]) > TARGETS_MAX:
        raise UnsupportedAdapterError(
            f"target_modules is a pattern for {len(config['target_modules'])} modules that do not fit into "
            f"{CONFIG_NAME} as names; train it with a list of module names."
        )
    path.write_bytes(body)


def _modules(weights: Path, limits: Limits) -> list[str]:
    """Return the modules a weights file holds a LoRA for; reads its header alone."""
    try:
        with open_regular(weights) as file:
            header = read_header(
                file,
                header_bytes_max=limits.max_header_bytes,
                tensors_max=limits.max_tensors,
                metadata_bytes_max=limits.max_metadata_bytes,
            )
    except HeaderError as error:
        raise UnsupportedAdapterError(f"{WEIGHTS_NAME} is refused: {error}; save it again.") from error
    found = {match["module"] for tensor in header.tensors if (match := _TENSOR.fullmatch(tensor.name[:512]))}
    if not found:
        raise UnsupportedAdapterError(f"{WEIGHTS_NAME} holds no LoRA weight; save a LoRA adapter with PEFT.")
    return sorted(found)


def _shortest(modules: list[str], base: BaseModel) -> list[str]:
    """Return names for exactly these modules: the last part where no other layer ends so, else the whole name."""
    inside = set(modules)
    shared = {layer.rpartition(".")[2] for layer in base.layers if layer not in inside}
    names = {module if (last := module.rpartition(".")[2]) in shared else last for module in modules}
    return sorted(names)


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 120 else text[:117] + "...")
