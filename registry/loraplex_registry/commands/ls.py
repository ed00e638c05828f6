"""`registry ls`: tenants, a tenant's adapters, or an adapter's versions and tags. Nothing listed is verified.

  registry ls                  the tenants
  registry ls TENANT           a tenant's adapters
  registry ls TENANT/ADAPTER   an adapter's versions, with the tags on them

Names are printed as they are found, one request per 1000. A name may be a pattern of the shell's: quote it, as in
`registry ls 'acme/orders-*'`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from ..errors import AdapterNotFoundError, InvalidReferenceError
from ..lifecycle.listing import (
    ListedTag,
    ListedVersion,
    in_parallel,
    list_adapters,
    list_tags,
    list_tenants,
    list_versions,
    version_names,
)
from ..progress import readable
from ..refs import AdapterRef, parse_version
from ..storage.store import Store
from .session import Listing, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "scope",
        metavar="TENANT[/ADAPTER]",
        nargs="?",
        help="a tenant for its adapters, an adapter for its versions; either may be a pattern; default: all tenants",
    )
    parser.add_argument(
        "--long",
        "-l",
        action="store_true",
        help="with the newest version of every adapter (two requests each)",
    )
    parser.add_argument("--limit", type=_limit, metavar="N", help="stop after N")
    parser.add_argument("--after", metavar="NAME", help="begin behind this name (the member next of --json)")
    parser.add_argument(
        "--jsonl", action="store_true", help="print one JSON object per line, as they are found"
    )


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1_000_000_000:
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is not a whole number of 1 or more")
    return int(text)


def run(session: Session) -> Listing:
    """List tenants, adapters or versions."""
    store, scope = session.store(), session.arguments.scope or "*"
    tenant, slash, adapter = scope.partition("/")
    if slash and _is_pattern(tenant):
        raise InvalidReferenceError(f"{scope[:80]!r}: a pattern of tenants lists tenants; name one tenant.")
    if slash and not _is_pattern(adapter):
        return _versions(session, store, AdapterRef.parse(scope))
    if slash or not _is_pattern(tenant):
        return _adapters(session, store, tenant, adapter or "*")
    page = _Page(list_tenants(store, pattern=tenant, after=session.arguments.after or ""), session)
    return _Guided(
        head={},
        name="tenants",
        items=({"tenant": name} for name in page),
        line=lambda item: str(item["tenant"]),
        entry=lambda item: item["tenant"],
        tail=page.tail,
        empty=f"nothing in {store.url} yet; `registry push ./adapter` publishes one." if scope == "*" else "",
        guide="these are the tenants; `registry ls TENANT` lists a tenant's adapters.",
    )


@dataclass
class _Guided(Listing):
    """A listing that tells people, beside the output, what it listed and how to go on."""

    guide: str = ""

    def write(self, out: TextIO, *, form: str) -> int:
        """See `Listing.write`."""
        self.items = iter(self.items)
        first = next(self.items, None)
        if first is not None:
            self.items = itertools.chain([first], self.items)
        code = super().write(out, form=form)
        if first is not None and form == "text":
            print(f"registry: {self.guide}", file=sys.stderr)
        return code


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


class _Page:
    """The first `--limit` of some names; afterwards `next` is the last one if there are more."""

    def __init__(self, names: Iterable[Any], session: Session) -> None:
        self._names = names
        self._limit: int | None = session.arguments.limit
        self._next: str | None = None

    def __iter__(self) -> Iterator[Any]:
        last = None
        for number, name in enumerate(self._names):
            if number == self._limit:
                self._next = str(last)
                return
            yield name
            last = name

    def tail(self) -> dict[str, Any]:
        """Return the last members of the JSON object."""
        return {"next": self._next}


def _adapters(session: Session, store: Store, tenant: str, pattern: str) -> Listing:
    page = _Page(list_adapters(store, tenant, pattern=pattern, after=session.arguments.after or ""), session)
    items: Iterable[dict[str, Any]] = ({"adapter": f"{tenant}/{name}"} for name in page)
    if session.arguments.long:
        items = in_parallel(lambda item: {**item, **_newest(store, AdapterRef.parse(item["adapter"]))}, items)
    return Listing(
        head={"tenant": tenant},
        name="adapters",
        items=items,
        line=_adapter_line if session.arguments.long else lambda item: str(item["adapter"]),
        entry=dict if session.arguments.long else lambda item: item["adapter"].partition("/")[2],
        tail=page.tail,
        headings=_columns("ADAPTER", "VERSIONS", "NEWEST", "CREATED", "SIZE")
        if session.arguments.long
        else "",
        empty=(
            f"no adapter of tenant {tenant!r} in {store.url}; `registry ls` lists tenants, `registry ls "
            f"{session.settings.tenant or 'TENANT'}/ADAPTER` an adapter's versions."
        ),
    )


def _newest(store: Store, ref: AdapterRef) -> dict[str, Any]:
    """Return how many versions an adapter has and what the newest committed one is."""
    names = version_names(store, ref)
    # One at a time: the newest is nearly always committed.
    found = (entry for name in names for entry in list_versions(store, ref, [name]))
    newest = next((entry for entry in found if entry.state == "committed"), None)
    return {"versions": len(names), "newest": None if newest is None else asdict(newest)}


def _adapter_line(item: dict[str, Any]) -> str:
    newest = item["newest"] or {"version": "-", "created": "-", "size_bytes": None}
    size = "-" if newest["size_bytes"] is None else readable(newest["size_bytes"])
    return _columns(item["adapter"], item["versions"], newest["version"], newest["created"], size)


def _columns(name: object, count: object, version: object, created: object, size: object) -> str:
    return f"{name!s:<40}  {count!s:>8}  {version!s:<10}  {created!s:<20}  {size!s:>9}"


def _versions(session: Session, store: Store, ref: AdapterRef) -> Listing:
    if ref != AdapterRef(ref.tenant, ref.adapter):
        raise InvalidReferenceError(f"ls takes no selector; `registry show {ref}` tells about one version.")
    names = version_names(store, ref)
    if not names:
        raise AdapterNotFoundError(
            f"{ref} is not in {store.url}; `registry ls {ref.tenant}` lists the tenant's adapters."
        )
    tags = list(list_tags(store, ref))
    if session.arguments.after is not None:
        after = parse_version(session.arguments.after)
        names = names[names.index(after) + 1 :] if after in names else names
    page = _Page(names, session)
    return Listing(
        head={"adapter": ref.name, "tags": [asdict(tag) for tag in tags]},
        name="versions",
        items=(_version_item(entry, tags) for entry in list_versions(store, ref, page)),
        line=_version_line,
        tail=page.tail,
        headings=f"{'VERSION':<12}  {'STATE':<9}  {'CREATED':<20}  {'SIZE':>9}  {'TAGS':<16}  DIGEST",
    )


def _version_item(entry: ListedVersion, tags: list[ListedTag]) -> dict[str, Any]:
    here = [tag for tag in tags if tag.version == entry.version]
    return {**asdict(entry), "tags": [{"tag": tag.tag, "generation": tag.generation} for tag in here]}


def _version_line(item: dict[str, Any]) -> str:
    size = "-" if item["size_bytes"] is None else readable(item["size_bytes"])
    tags = ",".join(f"{tag['tag']}({tag['generation']})" for tag in item["tags"]) or "-"
    return (
        f"{item['version']!s:<12}  {item['state']:<9}  {item['created'] or '-':<20}  {size:>9}  {tags:<16}  "
        f"{item['digest'] or '-'}"
    )
