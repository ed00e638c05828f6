"""The long forms of the encryption checks: more mutants, a million headers, sizes up to many segments."""

import random
import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex_registry.encryption.data_keys import new_data_key
from loraplex_registry.encryption.kek_file import FileKey, generate_encryption_key
from loraplex_registry.encryption.segments import HEADER_BYTES, SEGMENT_BYTES, ciphertext_size
from tests.registry.blobs import reader_of
from tests.registry.sealed_versions import CONTEXT, campaign, entry

pytestmark = pytest.mark.reliability
Figure = Callable[..., None]

HEADERS = 1_000_000
WRAPS = 100_000
MUTANTS = 5_000


def test_registry_encryption_mutants(figure: Figure, tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    found = campaign(tmp_path, count=MUTANTS, seed=seed)
    figure("encryption_mutants_tried", found.total, f"= {MUTANTS}", found.total == MUTANTS)
    figure("encryption_mutants_accepted", len(found.accepted), "= 0", not found.accepted)
    figure("encryption_mutants_other_errors", len(found.wrong_errors), "= 0", not found.wrong_errors)


def test_registry_encryption_headers_never_repeat(figure: Figure, tmp_path: Path) -> None:
    """Salt and nonce prefix are random: none repeats under one key, and each bit is set half of the time.

    A bit of so many fair draws is off by more than 6 standard deviations once in 5e8 cases.
    """
    key = new_data_key(_file_key(tmp_path), CONTEXT)
    file = entry("f", b"x")
    seen: set[bytes] = set()
    ones = [0] * ((HEADER_BYTES - 1) * 8)
    for _ in range(HEADERS):
        seen.add(key.inline(file, b"x")[1:HEADER_BYTES])
    for header in random.sample(sorted(seen), 20_000):
        value = int.from_bytes(header)
        for bit in range(len(ones)):
            ones[bit] += value >> bit & 1
    worst = max(abs(count - 10_000) / (20_000**0.5 / 2) for count in ones)
    figure("encryption_headers_distinct", len(seen), f"= {HEADERS}", len(seen) == HEADERS)
    figure("encryption_header_bit_bias_sigma", round(worst, 2), "< 6", worst < 6)


def test_registry_encryption_wrap_nonces_never_repeat(figure: Figure, tmp_path: Path) -> None:
    """The key-encryption key is used once a push; its 96-bit nonces are the first bytes of what it makes."""
    kek = _file_key(tmp_path)
    nonces = Counter(kek.wrap(b"dek", CONTEXT)[:12] for _ in range(WRAPS))
    figure("encryption_wrap_nonces_distinct", len(nonces), f"= {WRAPS}", len(nonces) == WRAPS)


def test_registry_encryption_sizes(figure: Figure, tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    key = new_data_key(_file_key(tmp_path), CONTEXT)
    wrong = 0
    sizes = [n * SEGMENT_BYTES + rng.randrange(-100, 100) for n in range(1, 40)]
    for size in [*sizes, *(rng.randrange(1, 8 << 20) for _ in range(60))]:
        body = rng.randbytes(64) + bytes(max(size - 64, 0))
        body = body[:size]
        file = entry("f", body)
        ciphertext = key.inline(file, body)
        read = key.decrypting(reader_of(ciphertext, piece_bytes=rng.randrange(1000, 2 << 20)), file)
        same = b"".join(map(bytes, read(0, size))) == body
        wrong += len(ciphertext) != ciphertext_size(size) or not same
    figure("encryption_sizes_wrong", wrong, "= 0", wrong == 0)


def _file_key(directory: Path) -> FileKey:
    generate_encryption_key(directory / "acme.one.kek", "acme")
    return FileKey.load(directory / "acme.one.kek", tenant="acme")
