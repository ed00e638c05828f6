"""`registry init`: make a signing key, a trust policy, settings and a registry, once; what exists is kept.

The key is not encrypted, so that the first push needs no passphrase; `registry keys rotate` puts a better one in its
place. The policy trusts this key for this tenant, to sign adapters and to revoke them, and nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .. import durable
from ..configured import open_configured
from ..errors import ConflictError, SettingsError
from ..refs import check_name
from ..registry import utc_now
from ..settings import Settings, config_directory, data_directory, load_settings, settings_path
from ..signing import PublicKey, generate_key, load_public_key
from ..signing.keys import write_new
from ..storage.root_marker import initialise
from .session import Result, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--tenant", required=True, help="whose adapters you publish")


def run(session: Session) -> Result:
    """Make key, policy, settings and registry; keep what exists."""
    tenant = session.arguments.tenant
    check_name("tenant", tenant)
    path = settings_path(session.environment)
    if path.exists():
        if session.settings.tenant != tenant:
            raise ConflictError(
                f"{path} exists and is for tenant {session.settings.tenant}; edit it, or remove it first."
            )
        return _made_before(session, path, tenant)
    place = config_directory(session.environment)
    url = session.settings.registry or (data_directory(session.environment) / "registry").as_uri()
    key = place / "keys" / f"{tenant}.key"
    public = key.with_suffix(".pub")
    keyid = _key_pair(session, key, public).keyid
    url, made = _make_registry(session, url)
    policy = place / "policy.toml"
    _write_policy(policy, tenant)
    _write(path, _settings_text(tenant, url, session.settings))
    result = {
        "settings": str(path),
        "created": True,
        "registry": url,
        "registry_created": made,
        "tenant": tenant,
        "keyid": keyid,
        "key": str(key),
        "policy": str(policy),
    }
    return result, [
        f"registry  {url}",
        f"key       {key} ({keyid[:16]}…), not encrypted; `registry keys rotate` makes one with a passphrase",
        f"policy    {policy}",
        f"settings  {path}",
        "Next: registry push ./adapter --base ./base-model",
    ]


def _made_before(session: Session, path: Path, tenant: str) -> Result:
    """Keep the settings; make what they or the command line name and what is not there yet: registry and policy."""
    configured = load_settings(session.environment).registry
    url, made = _make_registry(session, session.settings.require("registry", option="--registry"))
    lines = [
        f"{path} exists and was not changed.",
        f"registry  {url} {'made' if made else 'was there already'}",
    ]
    if configured is not None and open_configured(session.settings, configured).url != url:
        lines.append(f"Give --registry {url} to use it; the settings name {configured}.")
    policy = path.with_name("policy.toml")
    ours = session.settings.policy == str(policy) and (path.parent / _public_key(tenant)).exists()
    trusting = ours and _write_policy(policy, tenant)
    if trusting:
        lines.append(f"policy    {policy} made; it trusts {_public_key(tenant)}")
    result = {
        "settings": str(path),
        "created": False,
        "registry": url,
        "registry_created": made,
        "policy_created": trusting,
    }
    return result, lines


def _public_key(tenant: str) -> str:
    return f"keys/{tenant}.pub"


def _key_pair(session: Session, key: Path, public: Path) -> PublicKey:
    """Make a key pair, or complete one that an interrupted run left without its public half."""
    if public.exists():
        return load_public_key(public)
    if not key.exists():
        return generate_key(key)
    try:
        found = session.load_signer(str(key)).public_key
    except SettingsError as error:
        raise SettingsError(
            f"{error.message} Its public half {public} is not there; if the key was never used, remove {key} and run "
            "`registry init` again."
        ) from error
    write_new(public, found.pem.encode("ascii"), mode=0o644)
    return found


def _make_registry(session: Session, url: str) -> tuple[str, bool]:
    """Make the registry when it is not there yet; return its whole address, and whether it was made."""
    store = open_configured(session.settings, url)
    return store.url, initialise(store, now=utc_now())


def _write_policy(path: Path, tenant: str) -> bool:
    if path.exists():
        return False
    _write(path, _policy_text(tenant))
    return True


def _write(path: Path, text: str) -> None:
    try:
        durable.write_new(path, text.encode("utf-8"), mode=0o644)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be written ({error.strerror}); make room and run it again."
        ) from error


def _policy_text(tenant: str) -> str:
    return f"""# Whose signature counts for which adapter. Everything not listed is refused.
version = 1
default = "deny"

[[rules]]
scope = "{tenant}/**"
keys = [{{ path = "{_public_key(tenant)}" }}]
revokers = [{{ path = "{_public_key(tenant)}" }}]
"""


def _settings_text(tenant: str, url: str, settings: Settings) -> str:
    lines = {
        "registry": url,
        "tenant": tenant,
        "key": f"keys/{tenant}.key",
        "policy": "policy.toml",
        "endpoint_url": settings.endpoint_url,
        "region": settings.region,
        "audit": "on",
    }
    # A JSON string is a TOML basic string.
    return "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines.items() if value
    )
