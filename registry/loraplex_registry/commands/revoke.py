"""`registry revoke`: put a version or a key on its tenant's signed revocation list, or look at the list.

Servers refuse what is on the list as soon as they have fetched it. Nothing is ever taken off it.
"""

from __future__ import annotations

import argparse
import datetime as dt

from ..errors import InvalidReferenceError, SettingsError
from ..format.moments import written
from ..refs import check_name
from ..registry import Registry, utc_now
from ..signing.keys import is_keyid, load_public_key
from ..trust.marks import MemoryMarks
from ..trust.policy import TrustedKey
from ..trust.policy_file import seconds
from ..trust.revocations import Revocation, RevocationList, verify_revocations
from ..trust.revoking import append
from .options import REFERENCE_HELP
from .session import Result, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ref", metavar="REF", nargs="?", help=f"the version to revoke: {REFERENCE_HELP}")
    parser.add_argument(
        "--keyid",
        metavar="KEYID",
        help="revoke everything signed with this key: 64 hex digits, as registry keys list --json prints them",
    )
    parser.add_argument("--tenant", metavar="NAME", help="whose list, with --keyid; default the settings'")
    parser.add_argument("--since", metavar="TIME", help="with --keyid: only what was signed from then on")
    parser.add_argument("--reason", metavar="TEXT", help="why, at most 120 characters; anybody can read it")
    parser.add_argument(
        "--expires",
        metavar="TIME",
        help="how long the list is valid, like 30d, or never; default as long as the list before it",
    )
    parser.add_argument("--key", metavar="FILE", help="the revoker's private key; default the settings'")
    parser.add_argument("--list", metavar="TENANT", help="print a tenant's list")
    parser.add_argument(
        "--refresh", metavar="TENANT", help="sign a tenant's list again, or begin an empty one"
    )
    parser.add_argument(
        "--signed-by",
        metavar="FILE",
        help="with --refresh: take over the list although the key of this public key file, which signed it, is no "
        "revoker any more",
    )


def run(session: Session) -> Result:
    """Revoke, refresh or list."""
    arguments = session.arguments
    wanted = [arguments.ref, arguments.keyid, arguments.list, arguments.refresh]
    if sum(item is not None for item in wanted) != 1:
        raise SettingsError("Name one of REF, --keyid KEYID, --list TENANT and --refresh TENANT.")
    if arguments.signed_by is not None and arguments.refresh is None:
        raise SettingsError("--signed-by says whose list to take over; give it with --refresh TENANT.")
    if arguments.list is not None:
        return _list(session, arguments.list)
    if arguments.refresh is not None:
        return _write(session, arguments.refresh, [])
    if not arguments.reason:
        raise SettingsError("A revocation needs --reason TEXT.")
    if arguments.keyid is not None:
        return _write(session, _tenant(session), [_key_entry(session)])
    ref = session.ref(arguments.ref)
    # The digest is what the storage says: to revoke a forged record harms nobody, and a wrong one must be revocable.
    digest = ref.digest or session.registry().resolve(ref).digest
    return _write(session, ref.tenant, [Revocation(arguments.reason, digest=digest)])


def _key_entry(session: Session) -> Revocation:
    arguments = session.arguments
    if not is_keyid(arguments.keyid):
        raise InvalidReferenceError(
            "--keyid is a key's full id, 64 hex digits; copy it from what `registry keys list --json` prints."
        )
    since = "" if arguments.since is None else written(_moment(arguments.since))
    return Revocation(arguments.reason, keyid=arguments.keyid, since=since)


def _moment(text: str) -> dt.datetime:
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidReferenceError(
            f"{text[:80]!r} is not a time; write 2026-01-31 or 2026-01-31T09:00:00Z."
        ) from error
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment


def _tenant(session: Session) -> str:
    tenant: str = session.arguments.tenant or session.settings.require("tenant", option="--tenant")
    check_name("tenant", tenant)
    return tenant


def _revokers(session: Session, tenant: str) -> list[TrustedKey]:
    check_name("tenant", tenant)
    found = {item.key.keyid: item for rule in session.policy().rules_of(tenant) for item in rule.revokers}
    if not found:
        raise SettingsError(
            f'The trust policy names no revokers for {tenant}; add revokers = [{{ path = "…" }}] to its rule.'
        )
    return list(found.values())


def _write(session: Session, tenant: str, entries: list[Revocation]) -> Result:
    registry, arguments = session.registry(), session.arguments
    for_ever = arguments.expires in (None, "never")
    lifetime_s = None if for_ever else seconds(arguments.expires)
    if not for_ever and lifetime_s is None:
        raise InvalidReferenceError('--expires is a time like "12h" or "30d", or "never".')
    signer = session.signer()
    stored, changed = append(
        session.store(),
        tenant,
        entries,
        signer,
        revokers=_revokers(session, tenant),
        now=utc_now(),
        lifetime_s=lifetime_s,
        keep_lifetime=arguments.expires is None,
        refresh=arguments.refresh is not None,
        marks=session.marks(registry),
        accept=() if arguments.signed_by is None else [TrustedKey(load_public_key(arguments.signed_by))],
    )
    if changed:
        session.record("revoke", tenant, signer, serial=stored.statement.serial)
    value = _value(stored.statement) | {"changed": changed}
    done = "signed" if changed else "unchanged"
    return value, [
        f"{tenant}: revocation list {done}, serial {stored.statement.serial}{_until(stored.statement)}",
        *_lines(stored.statement),
    ]


def _list(session: Session, tenant: str) -> Result:
    revokers, registry = _revokers(session, tenant), session.registry()
    statement = _verified(registry, tenant, revokers, session.marks(registry))
    if statement is None:
        return {"tenant": tenant, "serial": None, "entries": []}, [f"{tenant} has no revocation list."]
    head = f"{tenant}: serial {statement.serial}, issued {statement.issued}"
    return _value(statement), [
        head + _until(statement),
        *_lines(statement),
    ]


def _verified(
    registry: Registry, tenant: str, revokers: list[TrustedKey], marks: MemoryMarks
) -> RevocationList | None:
    found = registry.revocations(tenant)
    if found is None:
        return None
    return verify_revocations(found, tenant, revokers, now=utc_now(), marks=marks)


def _value(statement: RevocationList) -> dict[str, object]:
    return {
        "tenant": statement.tenant,
        "serial": statement.serial,
        "issued": statement.issued,
        "expires": statement.expires or None,
        "entries": [entry.to_value() for entry in statement.entries],
    }


def _until(statement: RevocationList) -> str:
    return f", expires {statement.expires}" if statement.expires else ""


def _lines(statement: RevocationList) -> list[str]:
    return [
        f"  {entry.digest or 'key ' + str(entry.keyid)}{' since ' + entry.since if entry.since else ''}  {entry.reason}"
        for entry in statement.entries
    ]
