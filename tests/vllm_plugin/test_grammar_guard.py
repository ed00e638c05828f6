"""One tenant's grammar must not slow the steps of all."""

import time
from typing import Any

import pytest

from loraplex_server.vllm_plugin.grammar_guard import BEGINNING_S, TOKEN_S, guard


class Row:
    """A row of vLLM's table of allowed tokens."""

    value = 0

    def fill_(self, value: int) -> None:
        self.value = value


def make(*, fill_s: float = 0.0, accept_s: float = 0.0) -> Any:
    """What makes grammars as vLLM has them, that take so much CPU time in each method."""

    def burn(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    class Grammar:
        def fill_bitmask(self, bitmask: list[Row], idx: int) -> None:
            burn(fill_s)
            bitmask[idx].fill_(1)

        def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
            burn(accept_s)
            return bool(request_id) and 0 not in tokens

    class Backend:
        def compile_grammar(self, request_type: str, grammar_spec: str, stop_token_ids: set[int]) -> Grammar:
            assert stop_token_ids == {2}
            return Grammar()

    guard(Backend, Grammar)
    guard(Backend, Grammar)  # harmless
    return lambda spec: Backend().compile_grammar("regex", spec, stop_token_ids={2})


def steps_of(grammar: Any, most: int) -> int:
    """How many tokens it takes until its request is ended."""
    for step in range(most):
        grammar.fill_bitmask([Row()], 0)
        if not grammar.accept_tokens("r", [1]):
            return step + 1
    return most


def test_a_quick_grammar_is_followed_as_before() -> None:
    grammar, row = make()("a"), Row()
    for _ in range(10):
        grammar.fill_bitmask([Row(), row], 1)
        assert grammar.accept_tokens("r", [1])
    assert row.value == 1
    assert not grammar.accept_tokens("r", [0])


@pytest.mark.parametrize("slow", ["fill_s", "accept_s"])
def test_a_slow_grammar_ends_all_that_follow_it_and_no_other(slow: str) -> None:
    new = make(**{slow: BEGINNING_S / 2})
    grammar, same, other = new("slow"), new("slow"), new("other")
    assert steps_of(grammar, 10) in (2, 3)
    begun, row = time.thread_time(), Row()
    same.fill_bitmask([row], 0)
    assert row.value == -1
    assert not same.accept_tokens("r", [1])
    assert time.thread_time() - begun < BEGINNING_S / 4, "it costs nothing any more"
    assert other.accept_tokens("r", [1])
    del grammar, same
    assert new("slow").accept_tokens("r", [1]), "with the last request that followed it, it is forgotten"


def test_what_a_grammar_takes_is_measured_by_its_tokens() -> None:
    assert steps_of(make(fill_s=TOKEN_S / 3, accept_s=TOKEN_S / 3)("plain"), 60) == 60
    assert steps_of(make(accept_s=3 * TOKEN_S)("costly"), 60) < 20


def test_a_class_without_these_methods_is_no_grammar() -> None:
    with pytest.raises(AttributeError):
        guard(object, object)
