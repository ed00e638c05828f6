"""`registry init`: make a signing key, a trust policy, settings and a registry, once; what exists is kept.

The key is not encrypted, so that the first push needs no passphrase; `registry keys rotate` puts a better one in its
place. The policy trusts this key for this tenant, to sign adapters and to revoke them, and nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import ConflictError
from ..refs import check_name
from ..registry import utc_now
from ..settings import Settings, config_directory, data_directory, settings_path
from ..signing import generate_key, load_public_key
from ..storage.root_marker import initialise
from ..storage.store import open_store
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
        return _made_elsewhere(session, path)
    place = config_directory(session.environment)
    url = session.settings.registry or (data_directory(session.environment) / "registry").as_uri()
    key = place / "keys" / f"{tenant}.key"
    public = key.with_suffix(".pub")
    keyid = (load_public_key(public) if public.exists() else generate_key(key)).keyid
    made = _make_registry(session, url)
    policy = place / "policy.toml"
    if not policy.exists():
        policy.write_text(_policy_text(tenant), encoding="utf-8")
    path.write_text(_settings_text(tenant, url, session.settings), encoding="utf-8")
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


def _made_elsewhere(session: Session, path: Path) -> Result:
    """Keep the settings; make the registry they or the command line name, when it is not there yet."""
    url = session.settings.require("registry", option="--registry")
    made = _make_registry(session, url)
    lines = [f"{path} exists and was not changed.", f"registry  {url}{'' if made else ' was there already'}"]
    return {"settings": str(path), "created": False, "registry": url, "registry_created": made}, lines


def _make_registry(session: Session, url: str) -> bool:
    store = open_store(url, endpoint_url=session.settings.endpoint_url, region=session.settings.region)
    return initialise(store, now=utc_now())


def _policy_text(tenant: str) -> str:
    return f"""# Whose signature counts for which adapter. Everything not listed is refused.
version = 1
default = "deny"

[[rules]]
scope = "{tenant}/**"
keys = [{{ path = "keys/{tenant}.pub" }}]
revokers = [{{ path = "keys/{tenant}.pub" }}]
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
