"""`registry keys list`: the keys of the trust policy and those that lie here, with dates and where they count."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..registry import utc_now
from ..signing.keys import PublicKey, load_public_key
from ..signing.signers import is_signer_uri
from ..trust.policy import TrustedKey, TrustPolicy
from .session import Result, Session

LOCAL_KEYS_MAX = 256
"""Most public key files beside the settings' key that are listed."""


def run(session: Session) -> Result:
    """List the keys."""
    policy = session.policy() if session.settings.policy else None
    entries = _policy_entries(policy, utc_now()) if policy is not None else {}
    for keyid, path in _local_keys(session).items():
        entry = entries.setdefault(keyid, {"keyid": keyid, "path": path, "uses": []})
        entry["private_key"] = str(Path(path).with_suffix(".key")) if _has_private(path) else None
    current = current_key(session)
    for entry in entries.values():
        entry["signs"] = current is not None and entry["keyid"] == current.keyid
    lines = []
    for entry in entries.values():
        lines.append(f"{entry['keyid'][:16]}…  {entry['path']}" + ("  signs here" if entry["signs"] else ""))
        lines += [
            f"  {use['role']:<12} {use['scope']}  {_dates(use)}  {use['state']}" for use in entry["uses"]
        ] or ["  in no rule of the policy"]
    return {"keys": list(entries.values())}, lines or ["no keys; `registry init` makes one"]


def current_key(session: Session) -> PublicKey | None:
    """Return the public key of the settings' key without opening the private one where that can be had."""
    if not session.settings.key:
        return None
    if is_signer_uri(session.settings.key):
        return session.signer().public_key
    public = Path(session.settings.key).with_suffix(".pub")
    return load_public_key(public) if public.is_file() else None


def _policy_entries(policy: TrustPolicy, now: dt.datetime) -> dict[str, dict[str, Any]]:
    """Return key id -> what the policy says about the key, in the order of the file."""
    entries: dict[str, dict[str, Any]] = {}
    for rule in policy.rules:
        roles = [("adapters", rule.keys), ("tags", rule.taggers), ("revocations", rule.revokers)]
        roles += [(f"tag {tag}", need.taggers or ()) for tag, need in rule.tags]
        roles += [("attestations", item.keys) for item in rule.attestations]
        for role, keys in roles:
            for trusted in keys:
                keyid = trusted.key.keyid
                entry = entries.setdefault(keyid, {"keyid": keyid, "path": trusted.path, "uses": []})
                entry["uses"].append({"scope": rule.scope, "role": role, **_state(trusted, now)})
    return entries


def _state(trusted: TrustedKey, now: dt.datetime) -> dict[str, str | None]:
    begin, end = trusted.valid_from, trusted.valid_to
    state = "counts"
    if begin is not None and now < begin:
        state = "not yet"
    elif end is not None and now >= end:
        state = "over"
    return {
        "from": None if begin is None else begin.isoformat(),
        "to": None if end is None else end.isoformat(),
        "state": state,
    }


def _dates(use: dict[str, Any]) -> str:
    return f"{(use['from'] or 'always')[:10]} to {(use['to'] or 'open')[:10]}"


def _local_keys(session: Session) -> dict[str, str]:
    """Return key id -> file of the public keys that lie beside the settings' key."""
    if not session.settings.key or is_signer_uri(session.settings.key):
        return {}
    found = {}
    for path in sorted(Path(session.settings.key).parent.glob("*.pub"))[:LOCAL_KEYS_MAX]:
        try:
            found[load_public_key(path).keyid] = str(path)
        except SettingsError:
            continue
    return found


def _has_private(public: str) -> bool:
    return Path(public).with_suffix(".key").is_file()
