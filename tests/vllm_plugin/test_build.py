"""C++ compiled at first use: one object per source and compiler, in a cache that is the user's alone."""

from __future__ import annotations

import concurrent.futures
import ctypes
from pathlib import Path

import pytest

from loraplex_server.vllm_plugin.cpu import build
from loraplex_server.vllm_plugin.cpu.build import BuildError, library

SOURCE = """
#include <omp.h>
#pragma GCC visibility push(default)
extern "C" int answer() {
    int sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < 4; i++) sum += i + VALUE;
    return sum;
}
#pragma GCC visibility pop
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    try:
        build.find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv(build.CACHE_ENV, str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def source(directory: Path, value: int = 9) -> Path:
    path = directory / "answer.cpp"
    path.write_text(SOURCE.replace("VALUE", str(value)))
    return path


def openmp_libraries() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "omp" in line.rpartition("/")[2]}


def test_an_object_is_built_once_in_an_empty_cache_without_a_second_openmp(tmp_path, cache):
    runtime = build.openmp_runtime()
    before = openmp_libraries()
    built = library([source(tmp_path)])
    assert ctypes.CDLL(str(built)).answer() == 42
    assert str(runtime) in before
    assert openmp_libraries() == before
    assert cache.stat().st_mode & 0o777 == 0o700
    changed = built.stat().st_mtime_ns
    assert library([source(tmp_path)]) == built
    assert built.stat().st_mtime_ns == changed
    assert list(cache.iterdir()) == [built]


def test_another_source_is_another_object(tmp_path, cache):
    first, second = library([source(tmp_path)]), library([source(tmp_path, 10)])
    assert first != second
    assert ctypes.CDLL(str(second)).answer() == 46


def test_many_at_once_build_one_whole_object(tmp_path, cache):
    one = source(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        built = set(pool.map(lambda _: library([one]), range(4)))
    assert len(built) == 1
    assert list(cache.iterdir()) == list(built)


def test_without_a_compiler_the_message_says_what_to_install(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="apt install g\\+\\+") as raised:
        library([source(tmp_path)])
    assert "\n" not in str(raised.value)


def test_without_a_compiler_an_object_that_lies_in_the_cache_serves(tmp_path, cache, monkeypatch):
    built = library([source(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert library([source(tmp_path)]) == built
    with pytest.raises(BuildError):
        library([source(tmp_path, 10)])


def test_a_compiler_that_fails_says_why_and_leaves_nothing(tmp_path, cache):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f() { return nothing_of_that_name; }")
    with pytest.raises(BuildError, match="nothing_of_that_name"):
        library([broken])
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("open_part", ["directory", "object"])
def test_what_others_may_write_is_not_loaded(tmp_path, cache, open_part):
    built = library([source(tmp_path)])
    (cache if open_part == "directory" else built).chmod(0o777)
    with pytest.raises(BuildError, match="of your own"):
        library([source(tmp_path)])


@pytest.mark.parametrize("broken", [b"", b"half an object"])
def test_an_object_that_cannot_be_loaded_is_built_anew(tmp_path, cache, broken):
    built = library([source(tmp_path)])
    built.chmod(0o700)
    built.write_bytes(broken)
    built.chmod(0o500)
    assert build.load([source(tmp_path)], {"answer": (build.INT, ())}).answer() == 42


def test_an_object_that_cannot_be_loaded_stays_where_nothing_could_build_another(
    tmp_path, cache, monkeypatch
):
    built = library([source(tmp_path)])
    built.chmod(0o700)
    built.write_bytes(b"for another machine")
    built.chmod(0o500)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="no C"):
        build.load([source(tmp_path)], {})
    assert built.read_bytes() == b"for another machine"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, cache, monkeypatch):
    def refuse(**_where: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(build.tempfile, "mkstemp", refuse)
    with pytest.raises(BuildError, match=f"{cache} cannot be used .Read-only file system.: set"):
        library([source(tmp_path)])


def test_a_user_without_a_home_is_told_what_to_set_and_can_set_it(tmp_path, cache, monkeypatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert library([source(tmp_path)]).parent == cache
    monkeypatch.delenv(build.CACHE_ENV)
    with pytest.raises(BuildError, match=f"set {build.CACHE_ENV}"):
        library([source(tmp_path)])


def test_a_link_is_not_loaded(tmp_path, cache):
    built = library([source(tmp_path)])
    moved = built.rename(tmp_path / "elsewhere.so")
    built.symlink_to(moved)
    with pytest.raises(BuildError, match="of your own"):
        library([source(tmp_path)])
