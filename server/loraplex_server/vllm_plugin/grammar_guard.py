"""A bound on what one request's grammar costs the engine's steps, which all requests share.

vLLM asks a grammar within each step which tokens may come next, and tells it which one came. For an ambiguous grammar
that can take longer with every token. `form_sandbox` refuses those it sees through beforehand; this guard ends a
request whose grammar turns slow later on, with vLLM's own finish reason "error". Nobody else's request is touched.
"""

from __future__ import annotations

import time
from typing import Any, Final

STEP_S_MAX: Final = 0.1
"""CPU seconds that a grammar may take within one step."""
SLOW_STEPS_MAX: Final = 2
"""Slow steps after which a request is ended: one may be a page fault."""


def guard(grammar: Any) -> None:
    """Bound the costs of a class of vLLM's grammars. Calling it again is harmless.

    Raises:
        AttributeError: vLLM's class has not the methods it had.
    """
    if getattr(grammar, "loraplex_guarded", False):
        return
    fill, accept = grammar.fill_bitmask, grammar.accept_tokens

    def fill_bitmask(self: Any, bitmask: Any, idx: int) -> None:
        begun = time.thread_time()
        fill(self, bitmask, idx)
        _count(self, begun)

    def accept_tokens(self: Any, request_id: str, tokens: list[int]) -> bool:
        begun = time.thread_time()
        accepted: bool = accept(self, request_id, tokens)
        _count(self, begun)
        return accepted and self.loraplex_slow_steps < SLOW_STEPS_MAX

    grammar.fill_bitmask, grammar.accept_tokens = fill_bitmask, accept_tokens
    grammar.loraplex_slow_steps = 0
    grammar.loraplex_guarded = True


def _count(grammar: Any, begun: float) -> None:
    if time.thread_time() - begun > STEP_S_MAX:
        grammar.loraplex_slow_steps += 1
