"""Nothing a tenant can observe depends on whether another tenant's adapters exist, are resident, or fail."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_registry.refs import AdapterRef
from tests.server.worlds import NOBODYS, OWN, THEIRS, Seen, Worlds, two_worlds

# Prompts with beginnings in common, longer than a block of the prefix cache.
PROMPTS = tuple(tuple(range(length)) for length in (6, 14))
METHODS = ("load", "get", "pin", "unload", "validate", "rollout", "embed", "health_of")
prompts = st.sampled_from(PROMPTS)
names = st.sampled_from((*OWN, *THEIRS, *NOBODYS))

watched = st.one_of(
    st.tuples(st.just("generate"), st.just(""), prompts),
    st.tuples(st.just("generate"), names, prompts),
    st.tuples(st.sampled_from(METHODS), names),
    st.tuples(st.just("list")),
)
unseen = st.one_of(
    st.tuples(st.just("globex"), st.just("generate"), st.just(""), prompts),
    st.tuples(st.just("globex"), st.just("generate"), st.sampled_from((*THEIRS, *OWN)), prompts),
    st.tuples(st.just("globex"), st.sampled_from(("load", "get")), st.sampled_from(THEIRS)),
    st.tuples(st.just("admin"), st.sampled_from(("pin", "unload")), st.sampled_from(THEIRS)),
    st.tuples(st.just("fail")),
)
steps = st.lists(
    st.one_of(st.tuples(st.just("acme"), watched), st.tuples(st.just("others"), unseen)), max_size=12
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    with two_worlds(tmp_path_factory.mktemp("worlds")) as found:
        yield found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_a_tenant_cannot_tell_whether_another_one_is_there(
    worlds: Worlds, steps: list[tuple[str, tuple[Any, ...]]]
) -> None:
    worlds.run(worlds.alone.reset())
    worlds.run(worlds.shared.reset())
    for who, what in steps:
        if who == "others":
            _act(worlds, what)
            continue
        alone, shared = worlds.both(lambda world, what=what: getattr(world, what[0])("acme", *what[1:]))  # type: ignore[misc]
        assert alone == shared, f"acme sees a difference in {what}"
    for alone, shared in (
        worlds.both(lambda world: world.list("acme")),
        worlds.both(lambda world: world.health()),
        (worlds.alone.series("acme"), worlds.shared.series("acme")),
    ):
        assert alone == shared


def _act(worlds: Worlds, what: tuple[Any, ...]) -> None:
    """Something that happens in the second world only."""
    if what[0] == "fail":
        worlds.shared.rig.engine.refuse_names.add(f"globex/b0@{_digest(worlds)}")
    else:
        worlds.run(getattr(worlds.shared, what[1])(what[0], *what[2:]))


def _digest(worlds: Worlds) -> str:
    return str(worlds.shop.registry.resolve(AdapterRef("globex", "b0")).digest)


def test_the_worlds_do_differ_for_the_other_tenant(worlds: Worlds) -> None:
    """The comparison can fail: what the others see is not the same."""
    worlds.run(worlds.shared.reset())
    alone, shared = worlds.both(lambda world: world.generate("globex", "globex/b0", PROMPTS[0]))
    assert (alone.status, shared.status) == ("NOT_FOUND", "OK")
    alone, shared = worlds.both(lambda world: world.list("admin"))
    assert alone != shared


def test_one_tenants_prefixes_are_never_found_for_another(worlds: Worlds) -> None:
    """The simulated prefix cache is truthful: the same tenant and adapter find what they left, nobody else does."""

    def cached(who: str, adapter: str) -> str:
        seen: Seen = worlds.run(worlds.shared.generate(who, adapter, PROMPTS[1]))
        return seen.messages[-1]

    worlds.run(worlds.shared.reset())
    assert "cached_tokens" not in cached("globex", "")
    assert "cached_tokens" not in cached("acme", "")
    assert "cached_tokens: 12" in cached("acme", "")
    assert "cached_tokens" not in cached("acme", "acme/a0")
    assert "cached_tokens: 12" in cached("acme", "acme/a0")
