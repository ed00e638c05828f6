"""Compile C++ at first use with the machine's own compiler, once per user and machine.

`load(sources, signatures)` returns a shared object, built if it is not in the cache yet. The cache is a directory
of the user's own (mode 0700): ``$LORAPLEX_KERNEL_CACHE``, else ``loraplex/kernels`` in ``$XDG_CACHE_HOME`` or
``~/.cache``. A file is named by the SHA-256 of its sources, flags, OpenMP runtime and compiler, written under another
name and renamed, so any number of processes may build at once and none sees half a file; nothing in it is ever changed.
Where there is no compiler, an object of the same sources that lies there already is taken: an image can bring one.

The object is linked against the OpenMP runtime that torch has loaded already: a second runtime in one process would
start a second set of threads. Instruction sets are chosen at run time in the sources, not by flags here, so that a
cache shared by several machines serves all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

CACHE_ENV: Final = "LORAPLEX_KERNEL_CACHE"
COMPILERS: Final = ("g++", "clang++", "c++")
COMPILE_TIMEOUT_S: Final = 300.0
MESSAGE_CHARACTERS_MAX: Final = 600  # of a compiler's complaint, in our error
# No trapping and no errno: then the loops become vectors. Sums keep their order otherwise (no -ffast-math).
FLAGS: Final = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-Wno-ignored-attributes",
)  # fmt: skip


Signature = tuple[Any, Sequence[Any]]
"""What a function returns, and what it takes, as ctypes has them."""

INT: Final = ctypes.c_int
LONG: Final = ctypes.c_int64
FLOAT: Final = ctypes.c_float
POINTER: Final = ctypes.c_void_p


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why and what to install."""


def library(sources: Sequence[Path]) -> Path:
    """Return the shared object made of `sources`, compiling it if the cache has none.

    Args:
        sources: ``.cpp`` files are compiled; every other file is one they include, named so that a change of it
            makes another object.

    Raises:
        BuildError: no compiler, no OpenMP runtime, the compiler failed, or the cache cannot be written or is not the
            user's own.

    """
    try:
        return _library(sources)
    except OSError as error:
        raise BuildError(
            f"the cache {cache_directory()} cannot be used ({error.strerror}): set {CACHE_ENV}"
        ) from error


def _library(sources: Sequence[Path]) -> Path:
    runtime = openmp_runtime()
    made_of = cache_directory() / f"{sources[0].stem}-{_digest_of_sources(sources, runtime)}"
    try:
        compiler = find_compiler()
    except BuildError:
        built = sorted(made_of.parent.glob(f"{made_of.name}-*.so"))
        if not built:
            raise
        target = built[0]
    else:
        target = made_of.with_name(f"{made_of.name}-{_digest_of_compiler(compiler)}.so")
        if not target.exists():
            _compile(compiler, sources, runtime, target)
    _require_own(target)
    return target


def load(sources: Sequence[Path], signatures: Mapping[str, Signature]) -> ctypes.CDLL:
    """Build `sources` if need be, load them, and say what their functions return and take.

    An object that cannot be loaded is built anew, once: a machine that lost power may have kept its name alone.

    Raises:
        BuildError: see `library`; or the object cannot be loaded, as from a file system without execution.

    """
    target = library(sources)
    try:
        loaded = ctypes.CDLL(str(target))
    except OSError:
        find_compiler()
        target.unlink(missing_ok=True)
        try:
            loaded = ctypes.CDLL(str(library(sources)))
        except OSError as error:
            raise BuildError(f"what was built cannot be loaded ({error}): set {CACHE_ENV}") from error
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def find_compiler() -> tuple[str, ...]:
    """Return the C++ compiler's command: ``$CXX`` if set, else the first of g++, clang++, c++ on the path.

    Raises:
        BuildError: there is none.

    """
    named = os.environ.get("CXX", "").split()
    for command in (named,) if named else ([one] for one in COMPILERS):
        found = shutil.which(command[0])
        if found:
            return (found, *command[1:])
    raise BuildError(
        f"no C++ compiler ({' '.join(named) or ', '.join(COMPILERS)}): install one (Debian and Ubuntu: "
        "apt install g++; Fedora: dnf install gcc-c++) or name it in CXX"
    )


def openmp_runtime() -> Path:
    """Return the OpenMP library that torch has loaded into this process: its own, where there are others too.

    Other packages bring libraries of that kind for themselves (sentencepiece does). One that was preloaded in place of
    torch's serves our code as it serves torch: symbols of a preloaded library are found first.

    Raises:
        BuildError: there is none, or several and none of them torch's.

    """
    import torch

    loaded = {
        Path(line.split(maxsplit=5)[5].strip())
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.count("/")
        and Path(line.split(maxsplit=5)[5]).name.startswith(("libgomp", "libomp", "libiomp5"))
    }
    homes = [Path(torch.__file__).parent / "lib", Path(torch.__file__).parents[1] / "torch.libs"]
    chosen = {path for path in loaded if path.parent in homes} or loaded
    if len(chosen) != 1:
        raise BuildError(
            f"expected torch's OpenMP runtime in this process, found {sorted(map(str, loaded)) or 'none'}"
        )
    return chosen.pop()


def cache_directory() -> Path:
    """Return the cache, made if missing.

    Raises:
        BuildError: it cannot be made, or another user could write into it.

    """
    directory = Path(os.environ.get(CACHE_ENV) or _users_cache() / "loraplex" / "kernels")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot make the cache {directory} ({error.strerror}): set {CACHE_ENV}") from error
    _require_own(directory)
    return directory


def _users_cache() -> Path:
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError(f"this user has no home for a cache: set {CACHE_ENV}") from error


def is_own(status: os.stat_result) -> bool:
    """Whether a file or directory of this status is this user's, and no other may write it."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _require_own(path: Path) -> None:
    """Refuse to load code that someone else may have written."""
    status = path.lstat()
    if not is_own(status) or stat.S_ISLNK(status.st_mode):
        raise BuildError(
            f"{path} belongs to another user, can be written by one, or is a link: set {CACHE_ENV} to a directory of "
            "your own"
        )


def _digest_of_sources(sources: Sequence[Path], runtime: Path) -> str:
    digest = hashlib.sha256(repr((FLAGS, str(runtime), platform.machine())).encode())
    for source in sources:
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _digest_of_compiler(compiler: tuple[str, ...]) -> str:
    return hashlib.sha256(repr((compiler, _version(compiler))).encode()).hexdigest()[:8]


def _version(compiler: tuple[str, ...]) -> str:
    """Return the first line that the compiler says of itself."""
    return next(iter(_run([*compiler, "--version"]).splitlines()), "")


def _compile(compiler: tuple[str, ...], sources: Sequence[Path], runtime: Path, target: Path) -> None:
    handle, partial = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        objects = [str(source) for source in sources if source.suffix == ".cpp"]
        # With GNU's compiler the loader takes torch's runtime, being the one named. Clang's loops call LLVM's runtime,
        # which torch may not have, so there a loop marked for OpenMP stays on one thread.
        openmp = [] if "clang" in _version(compiler) else ["-fopenmp"]
        _run(
            [
                *compiler,
                *FLAGS,
                *openmp,
                *objects,
                "-o",
                partial,
                "-Wl,--as-needed",
                str(runtime),
                "-Wl,-Bsymbolic",
            ]
        )
        Path(partial).chmod(0o500)
        _to_disk(partial)
        Path(partial).replace(target)
        _to_disk(str(target.parent))
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(partial).unlink()


def _to_disk(path: str) -> None:
    """Have what was written survive a loss of power; of a directory, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run(command: list[str]) -> str:
    """Run a compiler and return what it prints.

    Raises:
        BuildError: it fails or takes too long.

    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(
            f"{command[0]} failed: {(done.stderr or done.stdout).strip()[:MESSAGE_CHARACTERS_MAX]}"
        )
    return done.stdout
