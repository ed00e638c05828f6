"""Where things lie under a registry's root. Every key is built here, from checked names only.

```
registry.json                              format of the root and the result of its probe
t/<tenant>/a/<adapter>/v/<version>.json    the record: one object is one commit
t/<tenant>/a/<adapter>/b/<version>~<pid>/<n>   blobs of push <pid>
t/<tenant>/a/<adapter>/tags/<tag>.json     mutable pointer
t/<tenant>/a/<adapter>/log/<tag>.json/<generation>.json   every earlier statement of a tag
t/<tenant>/revocations.json                what is not to be trusted any more
t/<tenant>/audit/<number>.json             what was done, each entry chained to the one before
```
"""

from __future__ import annotations

import re
from typing import Final

from ..errors import InvalidReferenceError
from ..refs import AdapterRef, Version, check_name, check_tag, check_version, parse_version

FORMAT_KEY: Final = "registry.json"
TENANTS_PREFIX: Final = "t/"
_PID = re.compile(r"[0-9a-f]{32}")


def adapters_prefix(tenant: str) -> str:
    """Return the prefix under which a tenant's adapters lie."""
    check_name("tenant", tenant)
    return f"t/{tenant}/a/"


def adapter_prefix(ref: AdapterRef) -> str:
    """Return the prefix of one adapter."""
    return f"{adapters_prefix(ref.tenant)}{ref.adapter}/"


def versions_prefix(ref: AdapterRef) -> str:
    """Return the prefix of an adapter's version records."""
    return adapter_prefix(ref) + "v/"


def tags_prefix(ref: AdapterRef) -> str:
    """Return the prefix of an adapter's tags."""
    return adapter_prefix(ref) + "tags/"


def blobs_prefix(ref: AdapterRef) -> str:
    """Return the prefix of an adapter's blobs, of all pushes."""
    return adapter_prefix(ref) + "b/"


def version_key(ref: AdapterRef, version: Version) -> str:
    """Return the key of a version's record."""
    check_version(version)
    return f"{versions_prefix(ref)}{version}.json"


def version_of_record(name: str) -> Version | None:
    """Return the version whose record is called `name` under `versions_prefix`; None for anything else."""
    stem = name.removesuffix(".json")
    if stem == name:
        return None
    try:
        return parse_version(stem)
    except InvalidReferenceError:
        return None


def tag_key(ref: AdapterRef, tag: str) -> str:
    """Return the key of a tag."""
    check_tag(tag)
    return f"{tags_prefix(ref)}{tag}.json"


def tag_logs_prefix(ref: AdapterRef) -> str:
    """Return the prefix under which every tag of an adapter has its log."""
    return adapter_prefix(ref) + "log/"


def tag_log_prefix(ref: AdapterRef, tag: str) -> str:
    """Return the prefix of a tag's earlier statements.

    The tag's name carries its suffix here too, so that no permission for `…/v/*` or `…/b/*` covers the log of a tag
    called v or b.
    """
    check_tag(tag)
    return f"{tag_logs_prefix(ref)}{tag}.json/"


def tag_log_key(ref: AdapterRef, tag: str, generation: int) -> str:
    """Return the key under which a tag's statement number `generation` is kept once it was replaced."""
    return f"{tag_log_prefix(ref, tag)}{generation:010d}.json"


def revocations_key(tenant: str) -> str:
    """Return the key of a tenant's revocation list."""
    check_name("tenant", tenant)
    return f"t/{tenant}/revocations.json"


def audit_prefix(tenant: str) -> str:
    """Return the prefix of a tenant's audit log."""
    check_name("tenant", tenant)
    return f"t/{tenant}/audit/"


def audit_key(tenant: str, number: int) -> str:
    """Return the key of an audit entry, counted from 1."""
    return f"{audit_prefix(tenant)}{number:012d}.json"


def blob_group(version: Version, pid: str) -> str:
    """Return the name of a push's group of blobs, below `blobs_prefix`."""
    return f"{version}~{pid}"


def parse_blob_group(name: str) -> tuple[Version, str] | None:
    """Return version and push id of a group called `name`; None when it is no such name."""
    stem, tilde, pid = name.partition("~")
    try:
        return (parse_version(stem), pid) if tilde and _PID.fullmatch(pid) else None
    except InvalidReferenceError:
        return None


def blob_name(version: Version, pid: str, index: int) -> str:
    """Return a blob's key relative to its adapter, as records carry it."""
    return f"b/{blob_group(version, pid)}/{index}"
