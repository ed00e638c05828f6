"""`torch.compile` for LoRA on CPU, which vLLM switches off, and what was compiled kept for the next start.

vLLM's CPU platform sets compilation mode NONE as soon as LoRA is on: its own wrapper could not be traced. In native
mode a wrapped layer adds one opaque operator with a constant, so the graph is the one without LoRA and a node more per
layer, and nothing in it depends on the batch or on adapters. `keep_compiling` wraps the platform's method so that it
does not see the LoRA settings where native mode will serve them, and nothing else is different: the method reads them
for this alone, which a test asserts.

vLLM writes what was compiled to disk, but on CPU fails to read it back, and compiles at every start: it asks what it
loaded to finish loading, which only the form it uses on GPUs knows. `reuse_compiled` gives the CPU's form that method.
The graph on disk holds what our layers were when it was made: numbers of modules, and by which operator each is
computed. It is found by a hash of the settings; `tell_apart` puts our code, its choices and the processor into those.

What is read back is code: `keep_to_own_files` sees to it that nobody else can have written it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import stat
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from vllm import envs

from loraplex_server.vllm_plugin.cpu import bf16, many_rows
from loraplex_server.vllm_plugin.cpu.build import BuildError, is_own
from loraplex_server.vllm_plugin.cpu.choice import reason_against_native

IN_THE_GRAPH: Final = (
    "manager.py", "layers.py", "ops.py", "panels.py", "bf16.py", "bf16_layers.py", "nf4.py", "nf4_layers.py",
)  # fmt: skip

_log = logging.getLogger("vllm.loraplex")  # below vLLM's own: it alone has a handler in vLLM's processes


def keep_compiling(platform: Any) -> None:
    """Wrap `platform.check_and_update_config`, a class method of vLLM's CPU platform. Twice is harmless."""
    original = platform.check_and_update_config
    if getattr(original, "keeps_compiling", False):
        return

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        lora = vllm_config.lora_config
        if lora is None or reason_against_native(vllm_config) or not _can_compile():
            original.__func__(cls, vllm_config)
            return
        vllm_config.lora_config = None
        try:
            original.__func__(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    check_and_update_config.keeps_compiling = True  # type: ignore[attr-defined]
    platform.check_and_update_config = classmethod(check_and_update_config)


def reuse_compiled() -> None:
    """Make vLLM able to read back what it compiled for a CPU. Calling it again is harmless.

    Raises:
        ImportError: torch has moved what it keeps compiled graphs in.

    """
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Compiled

    if not hasattr(Compiled, "finalize_loading"):
        Compiled.finalize_loading = _nothing_left


def keep_to_own_files() -> None:
    """Have compilation neither read nor build on files that another user of this machine may have written.

    vLLM loads what it compiled from ``VLLM_CACHE_ROOT`` with pickle, whoever that belongs to: where it is not this
    user's own, or others may write there, nothing is read from it. PyTorch compiles C++ against headers that it keeps
    in ``/tmp``, under a name that anyone can take first: where someone has, it compiles without keeping them, which
    takes up to twice as long.
    """
    from torch._inductor import config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    headers = Path(default_cache_dir())
    if not _made_or_own(headers):
        inductor.cpp_cache_precompile_headers = False
        os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = (
            "0"  # for processes of its own that it compiles in
        )
        _log.warning("%s is not this user's alone: compiling takes longer without it", headers)
    root = Path(envs.VLLM_CACHE_ROOT).resolve()  # a link is the user's own business; what it leads to counts
    if not _made_or_own(root):
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
        _log.warning(
            "%s can be written by others (chmod go-w) or is not this user's: the model is compiled anew at every "
            "start; VLLM_CACHE_ROOT names another directory",
            root,
        )


def _made_or_own(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        directory.mkdir(
            mode=0o700, parents=True
        )  # vLLM would make it for the group as well, where the umask is 002
    try:
        status = directory.lstat()
    except OSError:
        return False
    return is_own(status) and not stat.S_ISLNK(status.st_mode)


def _nothing_left(_compiled: Any, _vllm_config: Any) -> None:
    """All is loaded."""


def tell_apart(platform: Any, choices: Sequence[str]) -> None:
    """Have the same settings with other layers of ours count as other settings. Again is harmless.

    Args:
        platform: the class of vLLM's current platform, a CPU one; its `check_and_update_config` is wrapped.
        choices: what decides which of our layers an engine gets.

    """
    original = platform.check_and_update_config
    if getattr(original, "tells_apart", False):
        return

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        ours = {"loraplex": _fingerprint(tuple(choices))}
        vllm_config.additional_config = {**vllm_config.additional_config, **ours}
        original.__func__(cls, vllm_config)

    check_and_update_config.tells_apart = True  # type: ignore[attr-defined]
    platform.check_and_update_config = classmethod(check_and_update_config)


@functools.cache
def _fingerprint(choices: tuple[str, ...]) -> str:
    """Return a hash of the code that decides what a compiled graph holds of ours, and of what it decides by."""
    digest = hashlib.sha256(repr((choices, _linear_layers())).encode())
    for name in IN_THE_GRAPH:
        digest.update(hashlib.sha256(Path(__file__).with_name(name).read_bytes()).digest())
    return digest.hexdigest()


def _linear_layers() -> str:
    """Say which of ours this machine can have: a cache may be shared by several machines."""
    in_bytes = torch.cpu.get_capabilities().get("avx512_vnni", False)
    try:
        return f"{bf16.supported()} {in_bytes} {many_rows.useful(torch.bfloat16)}"
    except BuildError:
        return "none: they cannot be built"


def _can_compile() -> bool:
    """Whether torch could build C++ here; a server must not fail to start for want of a compiler."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(os.environ.get("CXX", "g++")) and header.is_file():
        return True
    _log.warning("the model is not compiled: that takes a C++ compiler and Python's headers (%s)", header)
    return False
