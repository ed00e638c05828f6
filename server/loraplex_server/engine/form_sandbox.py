"""The program that tries out forms of structured output: `python -m loraplex_server.engine.form_sandbox DIR SIZE`.

Each form is compiled for the base model's tokenizer in DIR (vocabulary SIZE) by the library that vLLM uses, and
followed for a few tokens, in a forked process of its own: whatever a hostile schema or expression does there, time out,
eat memory or crash, ends with that process. Time is counted as CPU time of one thread, so a busy machine refuses
nothing that an idle one takes.

Lines of JSON in, one form each, as `Form`; lines of JSON out: {"ready": null or why not} once, then for each form
{"problem": null, or why it is refused, "tried": whether that is the form's own doing}.
"""

import json
import os
import re
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from loraplex_server.engine.choices import choice_grammar
from loraplex_server.engine.protocol import Form

PARSE_S_MAX: Final = 0.1
"""CPU seconds of parsing: vLLM parses every form once more in the server's own event loop."""
COMPILE_S_MAX: Final = 10.0
"""CPU seconds of compiling: the engine compiles on threads beside its steps. `maxLength: 100` takes four of them with a
vocabulary of 128,000, and next to none with a small one."""
STEP_S_MAX: Final = 0.05
"""CPU seconds of saying which tokens may come next: the engine does that within a step, for everybody."""
STEPS: Final = 256
"""Tokens for which a form is followed, in each of two ways."""
FOLLOW_S_MAX: Final = 1.0
"""CPU seconds that all of them may take: a plain grammar takes a tenth of a millisecond for each."""
COMPILED_BYTES_MAX: Final = 64 << 20
CPU_S_MAX: Final = 15
"""CPU seconds after which the system ends a trial, in whole seconds."""
WALL_S_MAX: Final = 60.0
"""Seconds after which a trial is given up that got no CPU."""
MEMORY_BYTES_MAX: Final = 1 << 30
"""Address space that a trial may take beyond what the program has."""
STACK_BYTES: Final = 4 << 20
"""Half of what threads of the engine have, so that what passes here does not overflow there."""
PROBLEM_CHARS_MAX: Final = 300

_PLACE: Final = re.compile(r"^\[[\d:]+\] \S+ ")  # where in the library's source, and when
TOO_COSTLY: Final = "is too costly: compiling it, or following it, takes too much time or memory"


class _Trials:
    """Compiles forms for one tokenizer and follows them."""

    def __init__(self, directory: str, vocab_size: int) -> None:
        import xgrammar
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self._library: Any = xgrammar
        self._info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        self._compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)

    def problem(self, form: Form) -> str | None:
        """Say why a form is refused; None when it is not."""
        parse, compile_, text = self._steps(form)
        try:
            _, parse_s = _timed(lambda: parse(text))
            compiled, compile_s = _timed(lambda: compile_(text))
        except Exception as error:
            return f"is not valid: {_PLACE.sub('', str(error)).strip()}"
        if parse_s > PARSE_S_MAX or compile_s > COMPILE_S_MAX:
            return TOO_COSTLY
        if compiled.memory_size_bytes > COMPILED_BYTES_MAX:
            return TOO_COSTLY
        return self._follow(compiled)

    def _steps(self, form: Form) -> tuple[Callable[[str], Any], Callable[[str], Any], str]:
        grammar, compiler = self._library.Grammar, self._compiler
        if form.kind == "json_schema":
            return grammar.from_json_schema, compiler.compile_json_schema, form.text
        if form.kind == "regex":
            return grammar.from_regex, compiler.compile_regex, form.text
        text = choice_grammar(form.choices) if form.kind == "choice" else form.text
        return grammar.from_ebnf, compiler.compile_grammar, text

    def _follow(self, compiled: Any) -> str | None:
        """Walk along allowed tokens: at random, and repeating one as long as that is allowed."""
        return self._walk(compiled, repeating=False) or self._walk(compiled, repeating=True)

    def _walk(self, compiled: Any, *, repeating: bool) -> str | None:
        import numpy as np

        library, size = self._library, self._info.vocab_size
        matcher, mask = library.GrammarMatcher(compiled), library.allocate_token_bitmask(1, size)
        bits, draw = mask[0].numpy().view(np.uint8), np.random.default_rng(0)  # the same walk every time
        token, spent = -1, 0.0
        for _ in range(STEPS):
            # The better of two: the first may have met a page fault.
            cost = min(_timed(lambda: matcher.fill_next_token_bitmask(mask, 0))[1] for _ in range(2))
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")[:size])
            if not len(allowed):
                return "allows no answer, or none that the tokens of this base model can write"
            going_on = np.setdiff1d(allowed, self._info.stop_token_ids)
            if not len(going_on):
                return None
            if not (repeating and token in going_on):
                token = int(draw.choice(going_on))
            _, accepting = _timed(lambda token=token: matcher.accept_token(token))  # type: ignore[misc]
            spent += cost + accepting
            if cost + accepting > STEP_S_MAX or spent > FOLLOW_S_MAX:
                return TOO_COSTLY
        return None


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.thread_time()
    value = work()
    return value, time.thread_time() - begun


def _apart(work: Callable[[], str | None]) -> dict[str, Any]:
    """Do the work in a process of its own; the reply to write."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _in_child(work, writing)
    os.close(writing)
    told, _, _ = select.select([reading], [], [], WALL_S_MAX)
    answer = os.read(reading, 65_536) if told else b""
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if answer:
        return {"problem": json.loads(answer), "tried": True}
    return {"problem": TOO_COSTLY, "tried": bool(told)}


def _in_child(work: Callable[[], str | None], writing: int) -> None:
    """Tell the outcome in one write, and end. What dies before has told nothing."""

    def tell() -> None:
        problem = work()
        os.write(writing, json.dumps(problem and problem[:PROBLEM_CHARS_MAX]).encode())

    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES_MAX,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_MAX,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=tell)
        thread.start()
        thread.join()
    finally:
        os._exit(0)


def main() -> int:
    """Answer until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints does not print into the answers
    try:
        trials = _Trials(sys.argv[1], int(sys.argv[2]))
    except Exception as error:
        print(json.dumps({"ready": f"{type(error).__name__}: {error}"}), file=out)
        return 1
    os.nice(5)
    print(json.dumps({"ready": None}), file=out)
    for line in sys.stdin:
        asked = json.loads(line)
        form = Form(asked["kind"], asked["text"], tuple(asked["choices"]))
        print(json.dumps(_apart(lambda form=form: trials.problem(form))), file=out)  # type: ignore[misc]
    return 0


if __name__ == "__main__":
    sys.exit(main())
