"""Keyless signatures: a short-lived certificate of an identity provider's user, proven by a transparency log.

The work is done by the optional `sigstore` package (`pip install "loraplex[keyless]"`): certificate chain, certificate
transparency, log inclusion and the time of signing. It is given a trusted root from a file the policy names and never
fetches anything, so verification works offline and a root cannot change under a running server. The certificate lives
for minutes by design; what counts is that it was valid when the log saw the signature.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import SettingsError, SignatureInvalidError

TRUSTED_ROOT_BYTES_MAX: Final = 1 << 20
"""Longest trusted root file, in bytes (1 MiB)."""

EXTRA: Final = "keyless"
"""The optional extra of the package that brings `sigstore`."""


@dataclass(frozen=True, slots=True)
class KeylessAuthority:
    """Whose keyless signatures count: `identity` (an e-mail address or a workflow's URI) as told by `issuer` (a URL).

    Both are compared exactly. `trusted_root` is a sigstore trusted root, JSON.
    """

    trusted_root: bytes
    identity: str
    issuer: str

    def __post_init__(self) -> None:
        if not self.identity or not self.issuer.startswith("https://"):
            raise SettingsError("A keyless entry needs an identity and an issuer that starts with https://.")
        try:
            readable = isinstance(json.loads(self.trusted_root), dict)
        except ValueError:
            readable = False
        if not readable or len(self.trusted_root) > TRUSTED_ROOT_BYTES_MAX:
            raise SettingsError(
                "The trusted root of a keyless entry is not sigstore's JSON; name the right file."
            )

    @classmethod
    def load(cls, trusted_root_path: str | Path, identity: str, issuer: str) -> KeylessAuthority:
        """Read the trusted root from a file.

        Raises:
            SettingsError: it cannot be opened or is not JSON, or a name is out of shape.
        """
        try:
            with Path(trusted_root_path).open("rb") as file:
                body = file.read(TRUSTED_ROOT_BYTES_MAX + 1)
        except OSError as error:
            raise SettingsError(
                f"Trusted root {trusted_root_path} cannot be opened ({error.strerror}); nothing is trusted without it."
            ) from error
        return cls(body, identity, issuer)

    @property
    def name(self) -> str:
        """A short text for people."""
        return f"a keyless signature of {self.identity}"


def verify_keyless(bundle: object, payload_type: str, authority: KeylessAuthority) -> bytes:
    """Return the signed payload of a keyless bundle.

    Args:
        bundle: sigstore bundle v0.3 as a JSON value.
        payload_type: the DSSE payload type wanted.
        authority: trusted root, identity and issuer.

    Raises:
        SignatureInvalidError: another identity, or any proof in the bundle fails.
        SettingsError: the extra is not installed.
    """
    try:
        from sigstore.models import Bundle
        from sigstore.verify import Verifier
        from sigstore.verify.policy import Identity
    except ImportError as error:
        raise SettingsError(
            f'The policy asks for a keyless signature; install it with `pip install "loraplex[{EXTRA}]"`.'
        ) from error
    try:
        verifier = Verifier(trusted_root=_trusted_root(authority.trusted_root))
        wanted = Identity(identity=authority.identity, issuer=authority.issuer)
        found_type, payload = verifier.verify_dsse(Bundle.from_json(json.dumps(bundle)), wanted)
    except Exception as error:  # another library reads hostile bytes here: whatever it raises is a refusal
        raise SignatureInvalidError(
            f"The keyless signature is not one of {authority.identity[:100]} ({_first_line(error)}); "
            "sign as that identity, or look at the policy's trusted root."
        ) from error
    if found_type != payload_type:
        raise SignatureInvalidError(f"The signed statement is of another type than {payload_type}.")
    return payload  # type: ignore[no-any-return,unused-ignore]


def _trusted_root(body: bytes) -> Any:
    from sigstore.models import TrustedRoot
    from sigstore_models.trustroot import v1

    return TrustedRoot(v1.TrustedRoot.from_json(body))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
