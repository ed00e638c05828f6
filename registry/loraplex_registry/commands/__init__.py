"""What each command of `registry` does: one module a command, named like it.

A module offers `arguments(parser)`, which must import nothing heavy, and `run(session)`, which returns a JSON-able
result and the lines for people. A module with `GROUP = True` adds actions of its own (`registry keys gen`) and gives
each of them `options.common_options()`.
"""
