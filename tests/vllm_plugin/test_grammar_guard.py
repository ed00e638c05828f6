"""One request's grammar must not slow the steps of all."""

import time

import pytest

from loraplex_server.vllm_plugin.grammar_guard import SLOW_STEPS_MAX, STEP_S_MAX, guard


def make(*, fill_s: float = 0.0, accept_s: float = 0.0) -> type:
    """A grammar as vLLM has it, that takes so much CPU time in each method."""

    def burn(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    class Grammar:
        def fill_bitmask(self, bitmask: list[int], idx: int) -> None:
            burn(fill_s)
            bitmask[idx] = 1

        def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
            burn(accept_s)
            return bool(request_id) and 0 not in tokens

    guard(Grammar)
    guard(Grammar)  # harmless
    return Grammar


def test_a_quick_grammar_is_followed_as_before() -> None:
    grammar, bitmask = make()(), [0, 0]
    for _ in range(10):
        grammar.fill_bitmask(bitmask, 1)
        assert grammar.accept_tokens("r", [1])
    assert bitmask == [0, 1]
    assert not grammar.accept_tokens("r", [0])


@pytest.mark.parametrize("slow", [{"fill_s": 1.2 * STEP_S_MAX}, {"accept_s": 1.2 * STEP_S_MAX}])
def test_a_slow_grammar_ends_its_own_request_and_no_other(slow: dict[str, float]) -> None:
    kind = make(**slow)
    grammar, steps, accepted = kind(), 0, True
    while accepted and steps < 10:
        grammar.fill_bitmask([0], 0)
        accepted = grammar.accept_tokens("r", [1])
        steps += 1
    assert steps == SLOW_STEPS_MAX
    assert kind().accept_tokens("other", [1]), "each request has a grammar of its own"


def test_a_class_without_these_methods_is_no_grammar() -> None:
    with pytest.raises(AttributeError):
        guard(object)
