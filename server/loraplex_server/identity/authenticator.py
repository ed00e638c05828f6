"""From what a call brings to a principal: an API key, a token, or the client's certificate, in this order.

Without any source of identities every caller is the local admin; `config` allows that on loopback only. A credential
that is brought must be good: a wrong key is never made up for by a good certificate. Files are watched, see `watched`.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from loraplex_server.config import AuthSettings
from loraplex_server.errors import ConfigError, UnauthenticatedError
from loraplex_server.identity.api_keys import Known, parse_known
from loraplex_server.identity.principals import LOCAL_ADMIN, Principal
from loraplex_server.identity.tokens import (
    TOKEN_CHARS_MAX,
    KeySet,
    TokenRules,
    parse_key_set,
    principal_of,
)
from loraplex_server.watched import WatchedFile

_T = TypeVar("_T")

ALTERNATIVE_NAMES: Final = "x509_subject_alternative_name"
"""gRPC's name for what a verified client certificate is called; absent without one."""


class Authenticator:
    """See the module. One per server; `principal` is quick and safe to call from many threads."""

    def __init__(
        self,
        *,
        known: WatchedFile[Known] | None = None,
        key_set: WatchedFile[KeySet] | None = None,
        rules: TokenRules | None = None,
    ) -> None:
        """Use these sources; `rules` belong to `key_set`."""
        self._known = known
        self._key_set = key_set
        self._rules = rules

    @classmethod
    def from_settings(cls, settings: AuthSettings) -> "Authenticator":
        """Read the files that the settings name.

        Raises:
            ConfigError: one cannot be read or is wrong; the file is named.
        """
        known = _watched(settings.keys, parse_known)
        key_set = _watched(settings.jwks, parse_key_set)
        rules = None
        if key_set is not None:
            rules = TokenRules(
                issuer=settings.issuer,
                audience=settings.audience,
                tenant_claim=settings.tenant_claim,
                role_claim=settings.role_claim,
                leeway_s=settings.leeway_s,
            )
        return cls(known=known, key_set=key_set, rules=rules)

    def refresh(self) -> None:
        """Read again what changed; blocks, so call it from a thread."""
        for file in (self._known, self._key_set):
            if file is not None:
                file.refresh()

    def principal(self, authorization: str | None, peer: Mapping[str, Iterable[bytes]]) -> Principal:
        """Return who calls.

        Args:
            authorization: the value of that metadata, if any.
            peer: gRPC's authentication context of the connection; its names of a certificate were verified by gRPC.

        Raises:
            UnauthenticatedError: nothing that identifies the caller, or something wrong. Never repeats the credential.
        """
        if self._known is None and self._key_set is None:
            return LOCAL_ADMIN
        if authorization is None:
            return self._by_certificate(peer)
        scheme, _, credential = authorization.partition(" ")
        if scheme.lower() != "bearer" or not credential or len(credential) > TOKEN_CHARS_MAX:
            raise UnauthenticatedError(
                "send an API key or a token as metadata: authorization: Bearer <credential>"
            )
        found = None if self._known is None else self._known.value.by_key(credential)
        if found is not None:
            return found
        if self._key_set is None or self._rules is None or credential.count(".") != 2:
            raise UnauthenticatedError("this credential is not known here")
        return principal_of(credential, self._key_set.value, self._rules)

    def _by_certificate(self, peer: Mapping[str, Iterable[bytes]]) -> Principal:
        if self._known is not None:
            certificates = self._known.value.certificates
            names = (name.decode("utf-8", "replace") for name in peer.get(ALTERNATIVE_NAMES, ()))
            found = {certificates[name] for name in names if name in certificates}
            if len(found) == 1:
                return found.pop()
        raise UnauthenticatedError(
            "send an API key or a token as metadata: authorization: Bearer <credential>"
        )


def _watched(name: str, parse: Callable[[bytes], _T]) -> WatchedFile[_T] | None:
    if not name:
        return None
    try:
        return WatchedFile(Path(name), parse)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
