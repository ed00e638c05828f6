"""Where a base model's files are: a directory as it is, or a Hugging Face id, from the cache or downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..errors import SettingsError

MODEL_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""Files of a model repository that are used; code and other weight formats are never fetched."""


def checkpoint_directory(model: str) -> Path:
    """Return the directory of a base model.

    Args:
        model: a directory, or a Hugging Face id such as "org/name" (needs the package huggingface_hub, which comes
            with transformers; HF_HUB_OFFLINE and the other variables of that package are honoured).

    Raises:
        SettingsError: neither.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(MODEL_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(
            f"The base model {model!r} is no directory here and could not be had as a Hugging Face model "
            f"({type(error).__name__}); give a directory, or connect once to fetch it."
        ) from error
