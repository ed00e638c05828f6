"""The signed statement of OpenSSF Model Signing v1.0: an in-toto statement that lists files with their SHA-256.

Written in one form and read in that form alone (https://github.com/ossf/model-signing-spec, v1.0), except for the paths
a signer may say it ignored; see `bundles` for which and why.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final

from ..errors import SignatureInvalidError
from ..format.canonical import StrictJsonError, canonical, exact_object, parse
from .envelopes import PAYLOAD_BYTES_MAX
from .keys import is_keyid

IN_TOTO_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
RESOURCES_MAX: Final = 32
"""Most files in one bundle."""

IGNORED_MAX: Final = 8
"""Most ignored paths in one bundle."""

_GIT_NAMES: Final = frozenset({".git", ".gitattributes", ".github", ".gitignore"})
_SIGNATURE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\.(sig|sig\.json|sigstore|sigstore\.json)")


def make_statement(files: Mapping[str, str], *, subject: str) -> bytes:
    """Return the statement over files, canonical.

    Args:
        files: file name -> lower-case hex SHA-256.
        subject: a name for people; verifiers give it no meaning.
    """
    names = sorted(files)
    root = hashlib.sha256(b"".join(bytes.fromhex(files[name]) for name in names)).hexdigest()
    return canonical(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": subject, "digest": {"sha256": root}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": [],
                },
                "resources": [{"name": name, "algorithm": "sha256", "digest": files[name]} for name in names],
            },
        }
    )


def read_statement(payload: bytes) -> dict[str, str]:
    """Return {file name: hex SHA-256} of a Model Signing statement.

    Raises:
        SignatureInvalidError: any form but the one accepted.
    """
    try:
        statement = exact_object(
            parse(payload, limit_bytes=PAYLOAD_BYTES_MAX),
            frozenset({"_type", "subject", "predicateType", "predicate"}),
        )
        if statement["_type"] != STATEMENT_TYPE or statement["predicateType"] != PREDICATE_TYPE:
            raise StrictJsonError("another statement or predicate type")
        predicate = exact_object(statement["predicate"], frozenset({"serialization", "resources"}))
        ignored = _ignored_paths(predicate["serialization"])
        files = _resources(predicate["resources"])
        _check_harmless(ignored, files)
        _check_subject(statement["subject"], files)
    except StrictJsonError as error:
        raise SignatureInvalidError(
            f"The signed statement is refused ({error}); sign the adapter again."
        ) from error
    return files


def _ignored_paths(serialization: object) -> list[object]:
    fields = exact_object(
        serialization,
        frozenset({"method", "hash_type"}),
        optional=frozenset({"allow_symlinks", "ignore_paths", "shard_size"}),
    )
    if fields["method"] != "files" or fields["hash_type"] != "sha256" or "shard_size" in fields:
        raise StrictJsonError("only method files with sha256 is accepted")
    if fields.get("allow_symlinks", False) is not False:
        raise StrictJsonError("symbolic links are not accepted")
    ignored = fields.get("ignore_paths", [])
    if not isinstance(ignored, list) or len(ignored) > IGNORED_MAX:
        raise StrictJsonError("ignore_paths is not a list of acceptable length")
    return ignored


def _check_harmless(ignored: list[object], files: Mapping[str, str]) -> None:
    """Refuse every ignored path but those that no reader of an adapter ever opens."""
    signed = {name.lower() for name in files}
    for path in ignored:
        known = isinstance(path, str) and (path in _GIT_NAMES or _SIGNATURE_NAME.fullmatch(path) is not None)
        if not known or str(path).lower() in signed:
            raise StrictJsonError("a path is ignored that is neither git's nor a signature file")


def _resources(value: object) -> dict[str, str]:
    if not isinstance(value, list) or not 0 < len(value) <= RESOURCES_MAX:
        raise StrictJsonError("resources is not a list of acceptable length")
    files: dict[str, str] = {}
    for item in value:
        fields = exact_object(item, frozenset({"name", "algorithm", "digest"}))
        name, digest = fields["name"], fields["digest"]
        if (
            not isinstance(name, str)
            or name in files
            or fields["algorithm"] != "sha256"
            or not is_keyid(digest)
        ):
            raise StrictJsonError("a resource is out of shape or named twice")
        files[name] = digest
    return files


def _check_subject(value: object, files: dict[str, str]) -> None:
    """The root digest hashes the files' digests in the order listed; it must agree or the statement is inconsistent."""
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in files.values())).hexdigest()
    if not isinstance(value, list) or len(value) != 1:
        raise StrictJsonError("exactly one subject is needed")
    subject = exact_object(value[0], frozenset({"name", "digest"}))
    if exact_object(subject["digest"], frozenset({"sha256"}))["sha256"] != root:
        raise StrictJsonError("the subject's digest does not follow from the resources")
