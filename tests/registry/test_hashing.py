"""Digests of files and of their chunks."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.format import hashing, manifest
from loraplex_registry.format.hashing import FileHasher, entry_of


def test_a_file_of_one_chunk_lists_no_chunks() -> None:
    body = b"x" * manifest.CHUNK_BYTES
    entry = entry_of("f", body)
    assert entry.chunks == ()
    assert entry.chunk_digests == (hashlib.sha256(body).hexdigest(),)


@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    chunk=st.integers(1, 16),
    seed=st.binary(min_size=1, max_size=4),
)
def test_the_entry_depends_on_the_bytes_and_not_on_the_pieces(
    sizes: list[int], chunk: int, seed: bytes
) -> None:
    body = (seed * 500)[: sum(sizes)]
    before = hashing.CHUNK_BYTES
    hashing.CHUNK_BYTES = chunk  # the real one would need files of many MiB
    try:
        hasher, start = FileHasher(), 0
        for size in sizes:
            hasher.update(body[start : start + size])
            start += size
        entry = hasher.entry("f")
    finally:
        hashing.CHUNK_BYTES = before
    pieces = [body[i : i + chunk] for i in range(0, len(body), chunk)]
    assert (entry.size, entry.sha256) == (len(body), hashlib.sha256(body).hexdigest())
    if len(pieces) > 1:
        assert entry.chunks == tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
    else:
        assert entry.chunks == ()
