"""An int8 copy of a base model, made once and kept.

vLLM's bitsandbytes plugin quantizes to NF4 while it loads, but reads int8 only from a checkpoint that is int8
already; this makes that checkpoint with transformers and bitsandbytes (LLM.int8(), arXiv 2208.07339). The copy
is named by the digest of the base it was made from, so it can never stand for another one.
"""

import os
import shutil
import tempfile
from pathlib import Path


def int8_checkpoint(directory: Path, *, digest: str, cache_dir: Path) -> Path:
    """Give the directory of the int8 copy of a base model; makes it when it is not there.

    Args:
        directory: the base model in Hugging Face format.
        digest: "sha256:<hex>" of the base model's files.
        cache_dir: copies live in `<cache_dir>/int8/sha256-<hex>`.

    Several processes may call this at once: the copy appears whole, by a rename.
    """
    target = cache_dir / "int8" / digest.replace(":", "-")
    if target.is_dir():
        return target
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        _write(directory, draft)
        try:
            os.rename(draft, target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _write(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map="cpu" if not torch.cuda.is_available() else "cuda:0",
        trust_remote_code=False,
    )
    model.save_pretrained(target, safe_serialization=True)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(target)
