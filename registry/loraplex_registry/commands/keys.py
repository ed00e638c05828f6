"""`registry keys`: signing keys: make, list and rotate them.

A key is a file, or one in a key service or token, named by a URI: awskms:KEY, gcpkms:projects/…, azurekms://VAULT…,
hsm:[NUMBER][?label=TOKEN] (PKCS#11, $PYKCS11LIB), hv:NAME (HashiCorp Vault Transit). Credentials and PINs are never
arguments: they come from the service's own environment and from $LORAPLEX_KEY_PASSPHRASE_FILE.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from .options import common_options
from .session import Result, Session

GROUP = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    gen = actions.add_parser(
        "gen", parents=[common_options()], help="make a key pair: FILE and FILE with the suffix .pub"
    )
    gen.add_argument(
        "file", metavar="FILE", help="private key to write (PKCS#8 PEM, mode 0600); must not exist"
    )
    gen.add_argument(
        "--encryption", action="store_true", help="make a key that encrypts adapters instead, without .pub"
    )
    gen.add_argument("--tenant", help="whose adapters an encryption key is for; default the settings'")
    _add_making(gen)
    actions.add_parser("list", parents=[common_options()], help="the keys of the policy and those here")
    public = actions.add_parser(
        "public", parents=[common_options()], help="write the public key of a key, for policies"
    )
    public.add_argument("key", metavar="KEY", help="private key file or URI")
    public.add_argument("file", metavar="FILE", help="public key to write (PEM); must not exist")
    rotate = actions.add_parser(
        "rotate", parents=[common_options()], help="put a new key in the place of the settings' key"
    )
    rotate.add_argument("--to", metavar="KEY", help="an existing key file or URI; default: a new key file")
    rotate.add_argument(
        "--overlap", metavar="DAYS", type=_days, default=30, help="how long the old key counts; 30"
    )
    _add_making(rotate)


def run(session: Session) -> Result:
    """Do one of the actions."""
    action = session.arguments.action
    if action in ("list", "rotate"):
        done: Result = importlib.import_module(f".key_{action}", __package__).run(session)
        return done
    return _gen(session) if action == "gen" else _public(session)


def _add_making(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--algorithm", default="ecdsa-p256", help="ecdsa-p256 (default), ecdsa-p384, ecdsa-p521, ed25519"
    )
    parser.add_argument("--passphrase-file", help="encrypt the private key with the first line of this file")
    parser.add_argument(
        "--no-passphrase", action="store_true", help="leave the private key unencrypted, for machines"
    )


def _gen(session: Session) -> Result:
    from ..signing.keys import generate_key
    from .passphrases import new_passphrase

    arguments, path = session.arguments, Path(session.arguments.file)
    if arguments.encryption:
        return _gen_encryption(session, path)
    public = _public_path(path)
    passphrase = new_passphrase(session)
    key = generate_key(path, passphrase, algorithm=arguments.algorithm)
    result = {
        "key": str(path),
        "public_key": str(public),
        "keyid": key.keyid,
        "algorithm": key.algorithm,
        "encrypted": passphrase is not None,
    }
    return result, [
        f"private  {path} ({'encrypted' if passphrase else 'NOT encrypted: whoever reads the file can sign'})",
        f"public   {public}",
        f"keyid    {key.keyid}",
    ]


def _gen_encryption(session: Session, path: Path) -> Result:
    from ..encryption.kek_file import generate_encryption_key

    tenant = session.arguments.tenant or session.settings.require("tenant", option="--tenant")
    keyid = generate_encryption_key(path, tenant)
    result = {"key": str(path), "keyid": keyid, "tenant": tenant}
    return result, [f"encryption key  {path} of tenant {tenant}", f"keyid           {keyid}"]


def _public(session: Session) -> Result:
    from ..signing import load_signer
    from ..signing.keys import write_new

    passphrase = session.passphrase(session.environment.get("LORAPLEX_KEY_PASSPHRASE_FILE"))
    key = load_signer(session.arguments.key, passphrase).public_key
    path = Path(session.arguments.file)
    write_new(path, key.pem.encode("ascii"), mode=0o644)
    result = {"public_key": str(path), "keyid": key.keyid, "algorithm": key.algorithm}
    return result, [f"public   {path}", f"keyid    {key.keyid}"]


def _public_path(path: Path) -> Path:
    from ..errors import SettingsError

    public = path.with_suffix(".pub")
    if public == path:
        raise SettingsError(
            f"{path} would be both private and public key; name the private key without .pub."
        )
    return public


def _days(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 3650:
        raise argparse.ArgumentTypeError("a number of days from 0 to 3650")
    return int(text)
