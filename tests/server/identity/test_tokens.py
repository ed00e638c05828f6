"""Tokens: whose are believed, and every way to forge one that is known."""

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from loraplex_server.config import AuthSettings
from loraplex_server.errors import ConfigError, UnauthenticatedError
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.identity.principals import Principal, Role
from loraplex_server.identity.tokens import TokenRules, parse_key_set, principal_of

RULES = TokenRules(issuer="https://id.example", audience="loraplex", leeway_s=5)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    """A public key as it stands in a key set."""
    algorithms = jwt.algorithms
    kind: Any = {
        ec.EllipticCurvePrivateKey: algorithms.ECAlgorithm,
        rsa.RSAPrivateKey: algorithms.RSAAlgorithm,
        ed25519.Ed25519PrivateKey: algorithms.OKPAlgorithm,
    }
    maker = next(maker for base, maker in kind.items() if isinstance(key, base))
    found: dict[str, Any] = json.loads(maker.to_jwk(key.public_key()))
    return {**found, **({} if kid is None else {"kid": kid}), **more}


def key_set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


KEYS = parse_key_set(key_set(jwk(EC_KEY, "a"), jwk(RSA_KEY, "b"), jwk(ED_KEY, "c")))


def token(
    key: Any = EC_KEY, kid: str = "a", alg: str = "ES256", header: dict[str, Any] | None = None, **claims: Any
) -> str:
    now = int(time.time())
    body = {"iss": RULES.issuer, "aud": RULES.audience, "sub": "ada", "tenant": "acme", "exp": now + 60}
    body |= claims
    wanted = {name: value for name, value in body.items() if value is not None}
    return jwt.encode(wanted, key, algorithm=alg, headers={"kid": kid, **(header or {})})


@pytest.mark.parametrize(
    ("key", "kid", "alg"),
    [(EC_KEY, "a", "ES256"), (RSA_KEY, "b", "RS256"), (RSA_KEY, "b", "PS256"), (ED_KEY, "c", "EdDSA")],
)
def test_a_token_of_a_known_key_stands_for_its_subject_and_tenant(key: Any, kid: str, alg: str) -> None:
    assert principal_of(token(key, kid, alg), KEYS, RULES) == Principal("ada", "acme", Role.TENANT)
    assert principal_of(token(key, kid, alg, role="admin"), KEYS, RULES).role is Role.ADMIN
    assert principal_of(token(key, kid, alg, aud=["x", "loraplex"]), KEYS, RULES).name == "ada"


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://evil.example"},
        {"iss": None},
        {"aud": "other"},
        {"aud": None},
        {"sub": None},
        {"sub": "a b"},
        {"sub": "a\nwho=admin"},
        {"exp": None},
        {"exp": int(time.time()) - 60},
        {"exp": "soon"},
        {"nbf": int(time.time()) + 3600},
        {"iat": int(time.time()) + 3600},
        {"tenant": None},
        {"tenant": "../x"},
        {"tenant": ["acme"]},
        {"role": "root"},
        {"role": ["admin"]},
    ],
)
def test_a_token_that_says_the_wrong_thing_is_refused(claims: dict[str, Any]) -> None:
    with pytest.raises(UnauthenticatedError):
        principal_of(token(**claims), KEYS, RULES)


def test_forged_tokens_are_refused_and_not_repeated() -> None:
    good = token()
    head, body, signature = good.split(".")
    public = EC_KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    def by_hmac(secret: bytes) -> str:
        text = f"{part({'alg': 'HS256', 'kid': 'a'})}.{body}"
        mac = hmac.new(secret, text.encode(), hashlib.sha256).digest()
        return f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"

    forged = [
        token(OTHER),
        token(kid="unknown"),
        token(kid="b"),
        token(RSA_KEY, "a", "RS256"),
        token(header={"jku": "https://evil.example/keys"}),
        token(OTHER, header={"jwk": jwk(OTHER, "a")}),
        token(header={"x5c": ["AAAA"]}),
        token(header={"crit": ["x"], "x": 1}),
        by_hmac(public),
        by_hmac(b""),
        f"{part({'alg': 'none', 'kid': 'a'})}.{body}.",
        f"{part({'alg': 'ES256'})}.{body}.{signature}",
        f"{head}.{part({'sub': 'eve'})}.{signature}",
        f"{head}.{body}.{signature[:-4]}AAAA",
        f"{head}.{body}.",
        "a.b.c",
        "..",
        good + "x" * 9000,
    ]
    for wrong in forged:
        with pytest.raises(UnauthenticatedError) as caught:
            principal_of(wrong, KEYS, RULES)
        assert signature[:16] not in str(caught.value)
        assert "eve" not in str(caught.value)
        assert "evil" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"keys": []}',
        b'{"keys": [3]}',
        key_set(jwk(EC_KEY, None)),
        key_set(jwk(EC_KEY, "a"), jwk(RSA_KEY, "a")),
        key_set({"kty": "oct", "k": "c2VjcmV0", "kid": "a"}),
        key_set({"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA", "kid": "a"}),
        key_set(jwk(EC_KEY, "a", alg="HS256")),
        key_set(jwk(RSA_KEY, "a", alg="none")),
        key_set({**json.loads(jwt.algorithms.ECAlgorithm.to_jwk(EC_KEY)), "kid": "a"}),
        key_set(jwk(rsa.generate_private_key(public_exponent=65537, key_size=1024), "a")),
        key_set({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "a"}),
        key_set(*(jwk(EC_KEY, str(number)) for number in range(65))),
    ],
)
def test_a_key_set_that_must_not_be_used_is_refused(body: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_key_set(body)


def test_keys_for_encryption_are_passed_over() -> None:
    found = parse_key_set(key_set(jwk(EC_KEY, "a"), jwk(RSA_KEY, "b", use="enc")))
    assert set(found) == {"a"}


def test_keys_are_rotated_by_writing_the_file_again(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(key_set(jwk(EC_KEY, "a")))
    auth = Authenticator.from_settings(
        AuthSettings(jwks=str(path), issuer=RULES.issuer, audience=RULES.audience)
    )
    old, new = token(), token(OTHER, "b")
    assert auth.principal(f"Bearer {old}", {}).name == "ada"
    with pytest.raises(UnauthenticatedError):
        auth.principal(f"Bearer {new}", {})
    path.write_bytes(key_set(jwk(EC_KEY, "a"), jwk(OTHER, "b")))
    auth.refresh()
    assert {auth.principal(f"Bearer {each}", {}).name for each in (old, new)} == {"ada"}
    path.write_bytes(key_set(jwk(OTHER, "b")))
    auth.refresh()
    with pytest.raises(UnauthenticatedError):
        auth.principal(f"Bearer {old}", {})
    with pytest.raises(UnauthenticatedError):  # without any credential
        auth.principal(None, {})
