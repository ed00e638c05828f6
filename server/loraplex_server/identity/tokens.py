"""JSON Web Tokens (RFC 7519), signed with a key of a JSON Web Key Set file (RFC 7517).

The operator writes the identity provider's key set to a file; keys are rotated by writing it again. A token is
believed when its key id names a key of the set, the signature is that key's with the algorithm that belongs to the key,
issuer and audience are the configured ones, and its dates hold.

What is refused although the standards allow it: symmetric keys and `none` (RFC 8725, section 3), a key without id, RSA
below 2048 bits, a token that brings a key or an address of one along, and a token without subject, expiry or tenant.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from loraplex_registry.errors import InvalidReferenceError
from loraplex_registry.refs import check_name
from loraplex_server.errors import ConfigError, UnauthenticatedError
from loraplex_server.identity.principals import Principal, Role, is_printable_name

TOKEN_CHARS_MAX: Final = 8192
"""Longest token, in characters."""

KEYS_MAX: Final = 64
"""Most keys of one set."""

RSA_BITS_MIN: Final = 2048
"""Shortest RSA key, in bits (NIST SP 800-131A)."""

_EC: Final = MappingProxyType({"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"})
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_FOREIGN_KEYS: Final = frozenset({"jwk", "jku", "x5c", "x5u"})
_REFUSED: Final = "this token is not accepted here"


@dataclass(frozen=True)
class TokenKey:
    """A public key and the algorithms that may be used with it."""

    key: Any
    algorithms: tuple[str, ...]


KeySet = Mapping[str, TokenKey]
"""Key id -> key."""


@dataclass(frozen=True)
class TokenRules:
    """What a token must say.

    Attributes:
        issuer, audience: the values of `iss`, and one of those of `aud`.
        tenant_claim: name of the claim that holds the tenant.
        role_claim: name of the claim that holds the role; a token without it is a tenant's.
        leeway_s: seconds by which clocks may differ.
    """

    issuer: str
    audience: str
    tenant_claim: str = "tenant"
    role_claim: str = "role"
    leeway_s: float = 30.0


def parse_key_set(body: bytes) -> KeySet:
    """Read a JWKS file.

    Raises:
        ConfigError: not a key set, or a key in it that must not be used.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError("is not JSON") from error
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not 0 < len(entries) <= KEYS_MAX:
        raise ConfigError(f'must be a key set: {{"keys": [...]}} with 1 to {KEYS_MAX} keys')
    found: dict[str, TokenKey] = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ConfigError(f"key {number} is not an object")
        if entry.get("use", "sig") != "sig":  # for encryption; not ours to use
            continue
        kid = entry.get("kid")
        if not isinstance(kid, str) or not kid or kid in found:
            raise ConfigError(f"key {number} has no kid of its own")
        found[kid] = _key(entry, where=f"key {kid[:64]!r}")
    return found


def principal_of(token: str, keys: KeySet, rules: TokenRules) -> Principal:
    """Return who a token stands for.

    Raises:
        UnauthenticatedError: it is not believed. The message says which demand failed and repeats nothing of the token.
    """
    import jwt

    if len(token) > TOKEN_CHARS_MAX:
        raise UnauthenticatedError(f"{_REFUSED}: longer than {TOKEN_CHARS_MAX} characters")
    try:
        header = jwt.get_unverified_header(token)
        if _FOREIGN_KEYS & header.keys() or header.get("crit"):
            raise UnauthenticatedError(f"{_REFUSED}: its header asks for what this server does not do")
        known = keys.get(str(header.get("kid")))
        if known is None:
            raise UnauthenticatedError(f"{_REFUSED}: its key is not in this server's key set")
        claims: dict[str, Any] = jwt.decode(
            token,
            known.key,
            algorithms=list(known.algorithms),
            issuer=rules.issuer,
            audience=rules.audience,
            leeway=rules.leeway_s,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
    except jwt.ExpiredSignatureError as error:
        raise UnauthenticatedError(f"{_REFUSED}: it has expired; get a new one") from error
    except jwt.PyJWTError as error:
        raise UnauthenticatedError(f"{_REFUSED} ({type(error).__name__})") from error
    return _principal(claims, rules)


def _principal(claims: Mapping[str, Any], rules: TokenRules) -> Principal:
    subject, tenant = claims["sub"], claims.get(rules.tenant_claim)
    if not is_printable_name(subject):
        raise UnauthenticatedError(f"{_REFUSED}: its subject is not a printable name without spaces")
    try:
        check_name("tenant", tenant if isinstance(tenant, str) else "")
    except InvalidReferenceError as error:
        raise UnauthenticatedError(f"{_REFUSED}: it names no tenant in {rules.tenant_claim}") from error
    try:
        role = Role(claims.get(rules.role_claim, Role.TENANT))
    except ValueError as error:
        raise UnauthenticatedError(f"{_REFUSED}: its role is neither tenant nor admin") from error
    assert isinstance(tenant, str)
    return Principal(name=subject, tenant=tenant, role=role)


def _key(entry: Mapping[str, Any], *, where: str) -> TokenKey:
    import jwt
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    if "d" in entry:
        raise ConfigError(f"{where} is a private key; write the public one")
    kind, stated = entry.get("kty"), entry.get("alg")
    if kind == "EC" and entry.get("crv") in _EC:
        algorithms: tuple[str, ...] = (_EC[entry["crv"]],)
    elif kind == "OKP" and entry.get("crv") == "Ed25519":
        algorithms = ("EdDSA",)
    elif kind == "RSA":
        algorithms = ("RS256", "PS256") if stated is None else (str(stated),) if stated in _RSA else ()
    else:
        algorithms = ()
    if not algorithms or stated not in (None, *algorithms):
        raise ConfigError(f"{where} is of a kind that is not accepted; use EC, Ed25519 or RSA")
    try:
        key = jwt.PyJWK.from_dict(dict(entry), algorithm=algorithms[0]).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where} cannot be read ({type(error).__name__})") from error
    if isinstance(key, RSAPublicKey) and key.key_size < RSA_BITS_MIN:
        raise ConfigError(f"{where} has {key.key_size} bits, the least is {RSA_BITS_MIN}")
    return TokenKey(key, algorithms)
