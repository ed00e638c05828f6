"""Reading a safetensors file by its pages: what the usual library reads, and errors instead of wrong views."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_server.vllm_plugin.cpu.tensor_file import read_tensors

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_tensors(rng: random.Random) -> dict[str, torch.Tensor]:
    return {
        f"layer.{number}.{'w' * rng.randint(1, 9)}": torch.randn(
            *(rng.randint(1, 7) for _ in range(rng.randint(1, 3)))
        ).to(rng.choice(DTYPES))
        for number in range(rng.randint(1, 9))
    }


def test_tensors_are_those_that_the_usual_library_reads(tmp_path: Path):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for number in range(100):
        path = tmp_path / f"{number}.safetensors"
        save_file(random_tensors(rng), path, metadata={"a": "b" * rng.randint(0, 9)})
        ours, theirs = read_tensors(path), load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name


def test_values_that_are_not_aligned_in_the_file_are_read_all_the_same(tmp_path: Path):
    wanted = torch.randn(5)
    head = b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}} '
    for padding in range(8):
        body = head + b" " * padding
        path = tmp_path / "odd.safetensors"
        path.write_bytes(struct.pack("<Q", len(body)) + body + wanted.numpy().tobytes())
        assert torch.equal(read_tensors(path)["a"], wanted)


def test_there_is_a_pause_after_the_header_and_after_each_tensor(tmp_path: Path):
    save_file({str(number): torch.ones(2) for number in range(7)}, tmp_path / "some.safetensors")
    pauses = []
    read_tensors(tmp_path / "some.safetensors", lambda: pauses.append(1))
    assert len(pauses) == 8


def test_a_pause_may_end_the_reading(tmp_path: Path):
    save_file({"a": torch.ones(2)}, tmp_path / "some.safetensors")

    class StopError(Exception):
        pass

    def pause() -> None:
        raise StopError

    with pytest.raises(StopError):
        read_tensors(tmp_path / "some.safetensors", pause)


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path: Path):
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(2)}, path)
    read_tensors(path)["a"].zero_()
    assert torch.equal(read_tensors(path)["a"], torch.ones(2))


def test_tensors_outlive_the_removal_of_their_file(tmp_path: Path):
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.arange(40_000.0)}, path)
    tensors = read_tensors(path)
    path.unlink()
    assert torch.equal(tensors["a"], torch.arange(40_000.0))


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, cut: int):
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"some\.safetensors"):
        read_tensors(path)


def test_numbers_of_another_type_are_refused(tmp_path: Path):
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(4, dtype=torch.int32)}, path)
    with pytest.raises(ValueError, match="I32"):
        read_tensors(path)


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.safetensors")
