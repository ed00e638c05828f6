"""Where things lie under a registry's root. Every key is built here, from checked names only.

```
registry.json                              format of the root
t/<tenant>/a/<adapter>/v/<version>.json    the record: one object is one commit
t/<tenant>/a/<adapter>/b/<version>~<pid>/<n>   blobs of push <pid>
t/<tenant>/a/<adapter>/tags/<tag>.json     mutable pointer
```
"""

from __future__ import annotations

from typing import Final

from .refs import AdapterRef, check_name, check_tag, check_version

FORMAT_KEY: Final = "registry.json"
TENANTS_PREFIX: Final = "t/"


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


def version_key(ref: AdapterRef, version: int) -> str:
    """Return the key of a version's record."""
    check_version(version)
    return f"{versions_prefix(ref)}{version}.json"


def tag_key(ref: AdapterRef, tag: str) -> str:
    """Return the key of a tag."""
    check_tag(tag)
    return f"{tags_prefix(ref)}{tag}.json"


def blob_name(version: int, pid: str, index: int) -> str:
    """Return a blob's key relative to its adapter, as records carry it."""
    return f"b/{version}~{pid}/{index}"
