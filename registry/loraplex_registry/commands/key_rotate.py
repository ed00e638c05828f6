"""`registry keys rotate`: a new key counts from now, the old one until a date, and the settings name the new one."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

from ..errors import RegistryError, SettingsError
from ..registry import utc_now
from ..settings import settings_path
from ..signing.keys import PublicKey, generate_key, load_public_key, write_new
from ..signing.signers import is_signer_uri, load_signer
from ..trust.policy import TrustPolicy
from ..trust.rotation import replace_text, rotated
from .key_list import current_key
from .passphrases import new_passphrase
from .policy import list_findings
from .session import Result, Session


def run(session: Session) -> Result:
    """Rotate the settings' key."""
    old = current_key(session)
    if old is None:
        raise SettingsError(
            "The settings' key has no public key beside it; name the key to rotate in the settings."
        )
    policy = Path(session.settings.require("policy", option="--policy"))
    now = utc_now().replace(microsecond=0)
    until = now + dt.timedelta(days=session.arguments.overlap)
    new, private, public = (
        _made_key(session, now) if session.arguments.to is None else _existing_key(session, policy)
    )
    try:
        done = rotated(policy, old, new, public, now=now, until=until)
        replace_text(policy, done.text)
    except RegistryError:
        if session.arguments.to is None:  # made a moment ago, and known to nobody
            Path(private).unlink(missing_ok=True)
            public.unlink(missing_ok=True)
        raise
    settings_changed, lists = _point_settings(session, private), _lists(session, policy)
    result = {
        "old_keyid": old.keyid,
        "old_until": f"{done.old_until:%Y-%m-%dT%H:%M:%SZ}",
        "keyid": new.keyid,
        "key": private,
        "public_key": str(public),
        "policy": str(policy),
        "scopes": list(done.scopes),
        "settings_changed": settings_changed,
        "revocation_lists": lists,
    }
    lines = [
        f"new key  {private} ({new.keyid[:16]}…) counts from now for {', '.join(done.scopes)}",
        f"old key  {old.keyid[:16]}… counts until {done.old_until:%Y-%m-%d %H:%M} UTC",
        f"policy   {policy} was changed; bring it to every server before you push with the new key",
        "Next: registry resign, which signs adapters, tags and the revocation list with the new key",
        *(f"lists    {sentence}" for sentence in lists),
    ]
    if not settings_changed:
        lines.insert(3, f"settings do not name the new key yet; set key = {private!r} or give --key")
    return result, lines


def _lists(session: Session, policy: Path) -> list[str]:
    """Say which revocation lists the old key signed: when its time is over, nothing of their tenants is accepted."""
    if not session.settings.registry:
        return []
    try:
        found = list_findings(session, TrustPolicy.load(policy))
    except RegistryError as error:  # the key is rotated, whatever the storage says
        return [f"could not be looked at: {error.message} See `registry policy check --lists`."]
    return [f"{finding.scope}: {finding.sentence}" for finding in found]


def _made_key(session: Session, now: dt.datetime) -> tuple[PublicKey, str, Path]:
    place = _new_key_path(session, now)
    key = generate_key(place, new_passphrase(session), algorithm=session.arguments.algorithm)
    return key, str(place), place.with_suffix(".pub")


def _existing_key(session: Session, policy: Path) -> tuple[PublicKey, str, Path]:
    passphrase = session.passphrase(
        session.arguments.passphrase_file or session.environment.get("LORAPLEX_KEY_PASSPHRASE_FILE")
    )
    key = load_signer(session.arguments.to, passphrase).public_key
    if is_signer_uri(session.arguments.to):
        private, public = session.arguments.to, policy.parent / "keys" / f"{key.keyid[:16]}.pub"
    else:
        private = str(Path(session.arguments.to).resolve())
        public = Path(private).with_suffix(".pub")
    if not public.exists() or load_public_key(public) != key:
        write_new(public, key.pem.encode("ascii"), mode=0o644)
    return key, private, public


def _new_key_path(session: Session, now: dt.datetime) -> Path:
    """Return a free name beside the old key: acme.key becomes acme-20260131.key."""
    old = session.settings.require("key", option="--key")
    if is_signer_uri(old):
        raise SettingsError(
            "The settings' key is not a file; make the new key in its service and give it with --to."
        )
    stem = re.sub(r"-[0-9]{8}(-[0-9]+)?$", "", Path(old).stem) + f"-{now:%Y%m%d}"
    names = (Path(old).with_name(f"{stem}{suffix}.key") for suffix in ("", *(f"-{n}" for n in range(2, 100))))
    return next(name for name in names if not name.exists() and not name.with_suffix(".pub").exists())


def _point_settings(session: Session, private: str) -> bool:
    """Make the settings file name another key; False when it is not written in a way that can be edited."""
    path = settings_path(session.environment)
    if not path.is_file() or '"' in private or "\\" in private:
        return False
    text = path.read_text(encoding="utf-8")
    changed, count = re.subn(
        r'^key[ \t]*=[ \t]*"[^"\n]*"', lambda _: f'key = "{private}"', text, flags=re.MULTILINE
    )
    if count != 1:
        return False
    replace_text(path, changed)
    return True
