"""`registry tag`: make a tag point to a version.

Moving back is a move like any other: it gets a new generation. A tag whose rule asks for two signatures is moved with
`--key A --key B`, or by two people: one runs it with `--sign-only FILE`, the other with `--from FILE --key B`.

A version that is revoked, or whose key is, gets no tag: REVOKED, as readers would be told.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import InvalidReferenceError, PolicyRefusedError, SettingsError
from ..format.canonical import StrictJsonError, parse
from ..format.moments import written
from ..lifecycle.proposals import move_proposed, propose, proposed_statement
from ..lifecycle.tagging import TagMove, Target, find_target, move_tag, parse_expect, read_tag_state
from ..refs import AdapterRef, check_tag
from ..registry import utc_now
from ..signing import cosign_envelope, envelope_keyids
from ..storage.store import Store
from .options import keys_option
from .session import Result, Session

FILE_BYTES_MAX: Final = 1 << 20
"""Longest file with a signed statement, in bytes (1 MiB)."""

_AGE: Final = re.compile(r"([1-9][0-9]{0,4})([hdw])")
_HOURS: Final = {"h": 1, "d": 24, "w": 24 * 7}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "ref", metavar="REF", nargs="?", help="the version, as tenant/adapter@3, or another tag to copy"
    )
    parser.add_argument("tag", metavar="TAG", nargs="?", help="the tag to move")
    parser.add_argument(
        "--expect",
        metavar="NOW",
        help="only if the tag is at this generation, digest or semantic version now; 0: only if there never was one",
    )
    parser.add_argument(
        "--expires", metavar="WHEN", help="not believed after 2026-12-31T00:00:00Z, or after 12h, 30d, 8w"
    )
    keys_option(parser)
    parser.add_argument("--sign-only", metavar="FILE", help="write the signed statement, move nothing")
    parser.add_argument(
        "--from", metavar="FILE", dest="source", help="add a signature to this statement, then move"
    )


def run(session: Session) -> Result:
    """Move a tag, or work on the statement that moves it."""
    given = session.arguments
    if given.source is not None:
        return _from_file(session, Path(given.source))
    if given.ref is None or given.tag is None:
        raise InvalidReferenceError("Name the version and the tag: registry tag tenant/adapter@3 prod.")
    check_tag(given.tag)
    store = session.store()
    ref, target = _target(store, session.ref(given.ref))
    session.require_unrevoked(AdapterRef(ref.tenant, ref.adapter, version=target.version), target.record)
    known = session.tag_to_move(ref, given.tag)
    now = utc_now()
    expires = _expires(given.expires, now)
    signers = session.signers()
    if given.sign_only is not None:
        envelope = propose(store, ref, given.tag, target, signers, now=now, expires=expires)
        return _written(Path(given.sign_only), envelope)
    _require_enough(session, ref, given.tag, [signer.keyid for signer in signers])
    expect = None if given.expect is None else parse_expect(given.expect)
    move = move_tag(
        store, ref, given.tag, target, signers, now=now, expect=expect, expires=expires, known=known
    )
    session.record_move("tag", f"{ref.name}@{given.tag}", move, signers)
    return moved_result(ref, given.tag, move)


def moved_result(ref: AdapterRef, tag: str, move: TagMove) -> Result:
    """Return what commands that move tags print."""
    statement = move.statement
    digest = f"sha256:{statement.manifest_sha256}" if statement.manifest_sha256 else None
    result: dict[str, Any] = {
        "ref": f"{ref.name}@{tag}",
        "moved": move.moved,
        "generation": statement.generation,
        "version": statement.version,
        "digest": digest,
        "previous_version": None if move.previous is None else move.previous.version,
        "expires": statement.expires or None,
    }
    what = "points to nothing" if statement.version is None else f"points to {ref.name}@{statement.version}"
    again = "" if move.moved else " already"
    return result, [f"{ref.name}@{tag} {what}{again}, generation {statement.generation}"]


def _target(store: Store, ref: AdapterRef) -> tuple[AdapterRef, Target]:
    """Return the adapter and the version a reference means: by number, by tag or by digest."""
    name = AdapterRef(ref.tenant, ref.adapter)
    if ref.version is not None:
        return name, find_target(store, ref)
    if ref.tag is not None:
        state = read_tag_state(store, ref, ref.tag)
        if state is None or state.statement.version is None:
            raise InvalidReferenceError(f"{ref} points to nothing; name a version.")
        version = state.statement.version
    else:
        from ..registry import Registry

        version = Registry(store).resolve(ref).version
    return name, find_target(store, AdapterRef(ref.tenant, ref.adapter, version=version))


def _expires(text: str | None, now: dt.datetime) -> str:
    """Return the time a statement ends in its one spelling, "" for never."""
    if text is None:
        return ""
    age = _AGE.fullmatch(text)
    if age is not None:
        return written(now + dt.timedelta(hours=int(age[1]) * _HOURS[age[2]]))
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidReferenceError(
            f"{text[:40]!r} is no time; write 2026-12-31T00:00:00Z, or 12h, 30d, 8w from now."
        ) from error
    if moment.tzinfo is None:
        raise InvalidReferenceError(f"{text[:40]!r} lacks its zone; write 2026-12-31T00:00:00Z.")
    return written(moment)


def _from_file(session: Session, path: Path) -> Result:
    """Add our signature to a statement, then move the tag by it, unless it is for yet another person."""
    envelope = _read(path)
    statement = proposed_statement(envelope)
    signers = session.signers()
    if session.arguments.sign_only is not None:
        for signer in signers:
            envelope = cosign_envelope(envelope, signer)
        return _written(Path(session.arguments.sign_only), envelope)
    ref = AdapterRef(statement.tenant, statement.adapter)
    if statement.version is not None:
        place = AdapterRef(ref.tenant, ref.adapter, version=statement.version)
        session.require_unrevoked(place, find_target(session.store(), place).record)
    keyids = [*envelope_keyids(envelope), *(signer.keyid for signer in signers)]
    _require_enough(session, ref, statement.tag, keyids)
    move = move_proposed(session.store(), envelope, signers, now=utc_now())
    session.record_move("tag", f"{ref.name}@{statement.tag}", move, signers)
    return moved_result(ref, statement.tag, move)


def _require_enough(session: Session, ref: AdapterRef, tag: str, keyids: Sequence[str]) -> None:
    """Refuse a move that no reader under our own policy would believe: a tag that needs more signatures.

    Raises:
        PolicyRefusedError: the policy is set, asks for several signatures, and these are too few.
    """
    if session.settings.policy is None:
        return
    policy = session.policy()
    if not policy.matching(ref.name):
        return
    rule = policy.rule_for(ref.tenant, ref.adapter).tag_rule(tag)
    found = len({tagger.key.keyid for tagger in rule.taggers or ()} & set(keyids))
    if rule.threshold > 1 and found < rule.threshold:
        raise PolicyRefusedError(
            f"{ref.name}@{tag} needs {rule.threshold} signatures of its taggers, these are {found}; give more keys, or "
            "pass the statement on with --sign-only FILE."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = parse(file.read(FILE_BYTES_MAX + 1), limit_bytes=FILE_BYTES_MAX)
    except (OSError, StrictJsonError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); make it with --sign-only.") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{path} holds no signed statement; make it with --sign-only.")
    return value


def _written(path: Path, envelope: dict[str, Any]) -> Result:
    statement = proposed_statement(envelope)
    try:
        path.write_text(json.dumps(envelope, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}).") from error
    name = f"{statement.tenant}/{statement.adapter}@{statement.tag}"
    keyids = envelope_keyids(envelope)
    result = {
        "ref": name,
        "moved": False,
        "file": str(path),
        "generation": statement.generation,
        "version": statement.version,
        "keyids": list(keyids),
    }
    return result, [
        f"{path}: {name} to version {statement.version}, generation {statement.generation}, "
        f"{len(keyids)} signature{'s' if len(keyids) > 1 else ''}",
        f"Next: registry tag --from {path} --key KEY",
    ]
