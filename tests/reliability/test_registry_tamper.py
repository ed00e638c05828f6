"""The tamper campaign in full: every bit, 10,000 bits of the weights, 2,000 changed fields, every verdict vector."""

from collections.abc import Callable

import pytest

from tests.registry import tampering, test_vectors

BLOB_FLIPS = 10_000
MUTANTS = 2_000
pytestmark = pytest.mark.reliability
Figure = Callable[[str, int | float | str, str, bool], None]


@pytest.fixture(scope="module")
def world() -> tampering.World:
    return tampering.new_world()


@pytest.mark.parametrize("what", tampering.TARGETS)
def test_every_bit(what: str, world: tampering.World, figure: Figure) -> None:
    tally = tampering.every_bit(world, what, share=1.0)
    bad = len(tally.accepted) + len(tally.strange)
    figure(f"tamper {what}: bits flipped", tally.attempts, "all", tally.attempts > 0)
    figure(f"tamper {what}: accepted", bad, "0", bad == 0)
    tally.check()


def test_bits_of_the_weights(world: tampering.World, figure: Figure) -> None:
    tally = tampering.blob_bits(world, BLOB_FLIPS)
    refused = tally.refused["DIGEST_MISMATCH"]
    figure("tamper weights: bits refused", refused, f"= {BLOB_FLIPS}", refused == BLOB_FLIPS)
    tally.check()


def test_changed_fields(world: tampering.World, figure: Figure) -> None:
    tally = tampering.field_mutants(world, MUTANTS)
    tampering.transplants(world, tally)
    bad = len(tally.accepted) + len(tally.strange)
    figure("tamper fields: mutants", tally.attempts, f">= {MUTANTS}", tally.attempts >= MUTANTS)
    figure("tamper fields: accepted", bad, "0", bad == 0)
    tally.check()


def test_there_are_enough_vectors(figure: Figure) -> None:
    failing = sum(folder.name.endswith("_fail") for folder in test_vectors.FOLDERS)
    passing = len(test_vectors.FOLDERS) - failing
    figure("verdict vectors: refused", failing, ">= 60", failing >= 60)
    figure("verdict vectors: accepted", passing, ">= 15", passing >= 15)
