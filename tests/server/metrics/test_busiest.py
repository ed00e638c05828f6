"""Laws of the sketch that says which names are the busiest."""

import random
from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st

from loraplex_server.metrics.busiest import Busiest

RUNS = st.lists(st.tuples(st.integers(0, 6).map(str), st.integers(1, 20)), max_size=40)


@example(runs=[("a", 10), ("b", 10), ("c", 10), ("d", 11), ("a", 6)], names_max=3, halve_after=1000)
@example(
    runs=[(name, 75) for name in "abcdabc"] + [("d", 73), ("e", 100)],  # contends just before the halving
    names_max=4,
    halve_after=300,
)
@given(runs=RUNS, names_max=st.integers(1, 4), halve_after=st.integers(1, 300))
def test_never_more_than_the_cap_and_heavy_hitters_are_always_kept(
    runs: list[tuple[str, int]], names_max: int, halve_after: int
) -> None:
    sketch, weights, since = Busiest(names_max, halve_after=halve_after), Counter[str](), 0
    for name in (name for name, times in runs for _ in range(times)):
        since += 1
        if since >= halve_after:
            since = 0
            weights = Counter({known: weight * 0.5 for known, weight in weights.items()})
        kept, left = sketch.hit(name)
        weights[name] += 1.0
        assert kept == (name in sketch)
        assert left is None or left not in sketch
        assert len(sketch) <= names_max
        heavy = {known for known, weight in weights.items() if weight > weights.total() / names_max}
        assert all(known in sketch for known in heavy)


def test_a_long_tail_does_not_take_the_places_of_the_busy_nor_of_each_other() -> None:
    seed = 20261121
    print(f"seed {seed}")
    chance, sketch, moves = random.Random(seed), Busiest(16), 0
    for _ in range(60_000):
        busy = chance.random() < 0.5
        name = f"busy{chance.randrange(8)}" if busy else f"rare{chance.randrange(50_000)}"
        moves += sketch.hit(name)[1] is not None
    assert all(f"busy{number}" in sketch for number in range(8))
    assert moves < 600, "less than one call in a hundred moves a label"


def test_what_is_busy_now_displaces_what_was_busy_long_ago() -> None:
    sketch = Busiest(2, halve_after=1000)
    for _ in range(100_000):
        sketch.hit("old")
        sketch.hit("older")
    for _ in range(2500):
        sketch.hit("new")
    assert "new" in sketch
