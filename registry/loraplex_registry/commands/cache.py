"""`registry cache`: what lies in the cache of adapters on disk, and room made in it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from .options import common_options

if TYPE_CHECKING:
    from ..delivery.cache import Cache, CacheEntry
    from .session import Result, Session

GROUP: Final = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = actions.add_parser("ls", parents=[common_options()], help="list adapters, least recently used first")
    prune = actions.add_parser(
        "prune",
        parents=[common_options()],
        help="evict least recently used adapters that nobody uses, and remove what crashed downloads left",
    )
    prune.add_argument(
        "--max-bytes",
        type=int,
        default=0,
        metavar="N",
        help="keep at most N bytes (default 0: keep only what is in use)",
    )
    for action in (ls, prune):
        action.add_argument(
            "--cache-dir",
            metavar="DIR",
            help="the cache (adapters.cache_dir of a server); default $XDG_CACHE_HOME/loraplex/adapters",
        )


def run(session: Session) -> Result:
    """Run one action."""
    return {"ls": _ls, "prune": _prune}[session.arguments.action](session)


def _ls(session: Session) -> Result:
    from ..progress import readable

    cache = _cache(session)
    entries = cache.entries()
    total = sum(entry.size_bytes for entry in entries)
    result = {"cache": str(cache.root), "size_bytes": total, "entries": _values(entries)}
    lines = [
        f"{entry.digest}  {readable(entry.size_bytes):>10}  {_moment(entry)}{'  in use' if entry.leased else ''}"
        for entry in entries
    ]
    return result, [*lines, f"{len(entries)} adapters, {readable(total)} in {cache.root}"]


def _prune(session: Session) -> Result:
    from ..errors import SettingsError
    from ..progress import readable

    if session.arguments.max_bytes < 0:
        raise SettingsError("--max-bytes must be 0 or more.")
    cache = _cache(session)
    swept = cache.sweep()
    gone = cache.prune(session.arguments.max_bytes)
    freed = sum(entry.size_bytes for entry in gone)
    result = {"cache": str(cache.root), "freed_bytes": freed, "swept": swept, "evicted": _values(gone)}
    lines = [f"evicted {entry.digest}  {readable(entry.size_bytes)}" for entry in gone]
    return result, [
        *lines,
        f"{len(gone)} adapters, {readable(freed)} freed, {swept} unfinished downloads removed",
    ]


def _cache(session: Session) -> Cache:
    from ..delivery.cache import Cache, default_cache_root

    return Cache(session.arguments.cache_dir or default_cache_root(session.environment))


def _values(entries: Sequence[CacheEntry]) -> list[dict[str, Any]]:
    return [
        {
            "digest": entry.digest,
            "size_bytes": entry.size_bytes,
            "used": _moment(entry),
            "in_use": entry.leased,
        }
        for entry in entries
    ]


def _moment(entry: CacheEntry) -> str:
    import datetime as dt

    return dt.datetime.fromtimestamp(entry.used_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
