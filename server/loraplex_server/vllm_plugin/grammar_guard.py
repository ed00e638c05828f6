"""A bound on what a grammar costs the engine's steps, which all requests share.

vLLM asks a grammar within each step which tokens may come next, and tells it which one came. For an ambiguous grammar
that can take longer with every token, and an attacker may send the same one many times at once. `form_sandbox` refuses
those it sees through beforehand. This guard gives every grammar, with all requests that follow it now, a common budget:
some CPU time for each token, and a little at the beginning. Those of one that is over its budget are ended, with vLLM's
own finish reason "error", and cost nothing any more. Requests with other grammars or none are not touched.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Final
from weakref import WeakValueDictionary

TOKEN_S: Final = 0.005
"""CPU seconds that a grammar may take for a token on average; a plain one takes a hundredth of that."""
BEGINNING_S: Final = 0.1
"""CPU seconds that it may take beyond that: some are slow at first, with a large vocabulary."""


class _Use:
    """What a grammar has cost all the requests that follow it."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._tokens = 0

    def add(self, begun: float, tokens: int) -> None:
        self._spent_s += time.thread_time() - begun
        self._tokens += tokens

    @property
    def over(self) -> bool:
        return self._spent_s > BEGINNING_S + TOKEN_S * self._tokens


def guard(backend: Any, grammar: Any) -> None:
    """Bound the costs of vLLM's grammars, by the classes of the one who makes them and of what it makes.

    Calling it again is harmless.

    Raises:
        AttributeError: the classes have not the methods they had.
    """
    if getattr(grammar, "loraplex_guarded", False):
        return
    make, fill, accept = backend.compile_grammar, grammar.fill_bitmask, grammar.accept_tokens
    uses: WeakValueDictionary[Any, _Use] = WeakValueDictionary()
    making = threading.Lock()  # vLLM compiles on several threads

    def compile_grammar(self: Any, request_type: Any, grammar_spec: str, *args: Any, **options: Any) -> Any:
        made = make(self, request_type, grammar_spec, *args, **options)
        with making:
            made.loraplex_use = uses.setdefault((request_type, grammar_spec), _Use())
        return made

    def fill_bitmask(self: Any, bitmask: Any, idx: int) -> None:
        if self.loraplex_use.over:
            bitmask[idx].fill_(-1)  # anything: the token is not accepted
            return
        begun = time.thread_time()
        fill(self, bitmask, idx)
        self.loraplex_use.add(begun, 0)

    def accept_tokens(self: Any, request_id: str, tokens: list[int]) -> bool:
        if self.loraplex_use.over:
            return False
        begun = time.thread_time()
        accepted: bool = accept(self, request_id, tokens)
        self.loraplex_use.add(begun, len(tokens))
        return accepted and not self.loraplex_use.over

    backend.compile_grammar = compile_grammar
    grammar.fill_bitmask, grammar.accept_tokens = fill_bitmask, accept_tokens
    grammar.loraplex_guarded = True
