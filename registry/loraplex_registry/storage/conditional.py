"""Conditional writes that survive lost replies: nothing is believed before it was read back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import DamagedError, KeyAbsentError, KeyConflictError, StoreError, StoreUnavailableError

if TYPE_CHECKING:
    from .store import Store

WRITE_ATTEMPTS_MAX: Final = 4
"""How often one conditional write is tried when replies are lost."""


def write_conditionally(store: Store, key: str, body: bytes, *, etag: str | None) -> str:
    """Create (`etag` None) or swap an object whose bytes nobody else could write, reading back before believing a no.

    A reply may be lost after the write was applied, and a load balancer that sends a request twice turns success into
    a conflict with oneself (trino#27388, trino#27701). So neither silence nor a conflict is the end: what stands
    there is compared with what was sent. A refusal (403) is the last write; if an earlier one is in doubt, one look
    follows it, since "refused" would be a false answer to a write that has arrived meanwhile.

    Args:
        store: where.
        key: the object.
        body: must be unique to this call (it carries a random id), or a read-back could mistake another's for ours.
        etag: state the write applies to.

    Returns:
        The new etag.

    Raises:
        KeyConflictError: another writer was first, or wrote over ours before its lost reply could be cleared up.
        StoreUnavailableError: the storage stayed silent; `ambiguous` tells whether the write may have happened.
    """
    doubt = False
    for attempt in range(1, WRITE_ATTEMPTS_MAX + 1):
        try:
            return store.create(key, body) if etag is None else store.swap(key, body, etag=etag)
        except KeyConflictError:
            written = _read_back(store, key, body)
            if written is None:
                raise
            return written
        except StoreError as error:
            doubt = doubt or getattr(error, "ambiguous", False)
            if not doubt:
                raise
            written = _read_back(store, key, body)
            if written is not None:
                return written
            if attempt == WRITE_ATTEMPTS_MAX or not error.retryable:
                # A request that was believed lost may still arrive, so doubt does not go away by itself.
                raise StoreUnavailableError(error.message, ambiguous=True) from error
    raise AssertionError("unreachable")


def _read_back(store: Store, key: str, body: bytes) -> str | None:
    """Return the etag when the object holds exactly `body`.

    Raises:
        StoreUnavailableError: `ambiguous`: it cannot be found out, be it an outage or a refusal to let us read.
    """
    try:
        item = store.get(key, limit_bytes=max(len(body), 1))
    except (KeyAbsentError, DamagedError):  # not there, or longer than what we wrote
        return None
    except StoreError as error:
        raise StoreUnavailableError(
            f"Whether {key} was written cannot be found out ({error.message.rstrip('.')}); look before you repeat it.",
            ambiguous=True,
        ) from error
    return item.etag if item.body == body else None
