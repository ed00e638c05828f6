"""Key-encryption keys: files, AWS KMS (the test server's), Vault (its wire protocol on loopback)."""

import base64
import contextlib
import dataclasses
import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_examples.s3_server import S3Server
from loraplex_registry.encryption import kek_awskms
from loraplex_registry.encryption.kek_awskms import AwsKmsKey
from loraplex_registry.encryption.kek_file import FileKey, generate_encryption_key
from loraplex_registry.encryption.kek_vault import VaultKey
from loraplex_registry.encryption.key_providers import (
    KeyContext,
    KeyProvider,
    KeyRing,
    anchored_addresses,
    file_path,
    provider_from,
)
from loraplex_registry.errors import (
    DigestMismatchError,
    PolicyRefusedError,
    SettingsError,
    StoreRefusedError,
    StoreUnavailableError,
)
from tests.registry.sealed_versions import CONTEXT

DEK = bytes(range(131))
OTHERS = [
    dataclasses.replace(CONTEXT, tenant="globex"),
    dataclasses.replace(CONTEXT, adapter="other"),
    dataclasses.replace(CONTEXT, version=4),
    dataclasses.replace(CONTEXT, version="3.0.0"),
    dataclasses.replace(CONTEXT, pid="f" * 32),
]


@pytest.fixture
def kms_key(s3: S3Server) -> Callable[[str | None], str]:
    """Makes a KMS key, tagged with a tenant, and returns its ARN."""
    import boto3

    kek_awskms._client.cache_clear()
    client = boto3.client("kms", region_name="us-east-1")

    def make(tenant: str | None) -> str:
        tags = [{"TagKey": "tenant", "TagValue": tenant}] if tenant else []
        return str(client.create_key(Tags=tags)["KeyMetadata"]["Arn"])

    return make


class _Vault(http.server.BaseHTTPRequestHandler):
    """Vault's transit engine as far as it is used: AES-GCM, no associated data, 400 for a wrong ciphertext."""

    def do_POST(self) -> None:
        from cryptography.exceptions import InvalidTag

        name = self.path.rsplit("/", 1)[1]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("X-Vault-Token") != "token":
            return self._answer(403, {"errors": ["permission denied"]})
        key = self.server.keys.get(name)  # type: ignore[attr-defined]
        if key is None:
            return self._answer(400, {"errors": ["encryption key not found"]})
        try:
            if "/encrypt/" in self.path:
                nonce = os.urandom(12)
                sealed = nonce + key.encrypt(nonce, base64.b64decode(body["plaintext"]), None)
                return self._answer(
                    200, {"data": {"ciphertext": "vault:v1:" + base64.b64encode(sealed).decode()}}
                )
            sealed = base64.b64decode(body["ciphertext"].removeprefix("vault:v1:"))
            plain = key.decrypt(sealed[:12], sealed[12:], None)
            return self._answer(200, {"data": {"plaintext": base64.b64encode(plain).decode()}})
        except (InvalidTag, ValueError):
            return self._answer(400, {"errors": ["invalid ciphertext"]})

    do_PUT = do_POST  # noqa: N815

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A transit engine on loopback with the keys `acme` and `globex`."""
    pytest.importorskip("hvac")
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Vault)
    server.keys = {name: AESGCM(os.urandom(32)) for name in ("acme", "globex")}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("VAULT_ADDR", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("VAULT_TOKEN", "token")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def _file_key(path: Path) -> FileKey:
    generate_encryption_key(path, "acme")
    return FileKey.load(path, tenant="acme")


def check_provider(provider: KeyProvider, other: KeyProvider) -> None:
    """The laws of every provider."""
    wrapped = provider.wrap(DEK, CONTEXT)
    assert DEK not in wrapped
    assert provider.wrap(DEK, CONTEXT) != wrapped
    assert provider.unwrap(wrapped, CONTEXT) == DEK
    for context in OTHERS:
        with pytest.raises((DigestMismatchError, PolicyRefusedError)):
            provider.unwrap(wrapped, context)
    # The test server's KMS gives noise where AWS answers IncorrectKeyException; either way it is not the key.
    with contextlib.suppress(DigestMismatchError):
        assert other.unwrap(wrapped, CONTEXT) != DEK
    assert provider.uri != other.uri


def test_a_key_file_wraps_for_one_context(tmp_path: Path) -> None:
    one, two = _file_key(tmp_path / "one.kek"), _file_key(tmp_path / "two.kek")
    check_provider(one, two)
    wrapped = one.wrap(DEK, CONTEXT)
    for place in range(len(wrapped)):
        mutant = bytearray(wrapped)
        mutant[place] ^= 1
        with pytest.raises(DigestMismatchError):
            one.unwrap(bytes(mutant), CONTEXT)


def test_aws_kms_itself_refuses_another_context(kms_key: Callable[[str | None], str]) -> None:
    check_provider(AwsKmsKey(kms_key("acme")), AwsKmsKey(kms_key("acme")))


def test_kms_refusals_and_silence_are_told_apart(
    kms_key: Callable[[str | None], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arn = kms_key("acme")
    with pytest.raises(StoreRefusedError, match="NotFoundException"):
        AwsKmsKey(arn[:-4] + "0000").wrap(DEK, CONTEXT)
    kek_awskms._client.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(kek_awskms, "TRIES_MAX", 1)
    with pytest.raises(StoreUnavailableError, match="cannot be reached") as caught:
        AwsKmsKey(arn).unwrap(b"wrapped-secret", CONTEXT)
    kek_awskms._client.cache_clear()
    assert "wrapped-secret" not in str(caught.value)


def test_vault_wraps_for_one_context(vault: None) -> None:
    check_provider(VaultKey("transit/keys/acme"), VaultKey("transit/keys/globex"))


def test_vault_without_a_token_is_refused(vault: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "another")
    with pytest.raises(StoreRefusedError, match="VAULT_TOKEN"):
        VaultKey("transit/keys/acme").wrap(DEK, CONTEXT)
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailableError):
        VaultKey("transit/keys/acme").wrap(DEK, CONTEXT)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620])
def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "acme.kek"
    generate_encryption_key(path, "acme")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        FileKey.load(path, tenant="acme")
    path.chmod(0o400)
    FileKey.load(path, tenant="acme")


def test_a_key_file_is_never_overwritten_and_serves_one_tenant(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "acme.kek"
    generate_encryption_key(path, "acme")
    with pytest.raises(SettingsError, match="exists already"):
        generate_encryption_key(path, "acme")
    with pytest.raises(SettingsError, match="not tenant globex's"):
        FileKey.load(path, tenant="globex")
    with pytest.raises(PolicyRefusedError, match="another tenant's"):
        FileKey.load(path, tenant="acme").wrap(DEK, OTHERS[0])


def test_damaged_key_files_are_refused_without_showing_them(tmp_path: Path) -> None:
    path = tmp_path / "acme.kek"
    generate_encryption_key(path, "acme")
    good = path.read_text()
    secret = json.loads(good)["keyset"]
    short = secret[:-8] + "AAAA" + secret[-4:]
    for body in (
        "",
        "{}",
        good[:-1],
        good + "\n",
        good.replace("kek/1", "kek/2"),
        good.replace(secret, short),
        "\0" * 9,
    ):
        path.write_text(body)
        with pytest.raises(SettingsError) as caught:
            FileKey.load(path, tenant="acme")
        assert secret[20:40] not in str(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(SettingsError):
        FileKey.load(path, tenant="acme")


def test_a_record_cannot_steer_which_key_is_used(tmp_path: Path) -> None:
    """The address in a record is compared and nothing else: no file it names is opened."""
    mine, victim = tmp_path / "acme.kek", tmp_path / "victim.kek"
    generate_encryption_key(mine, "acme")
    uri = generate_encryption_key(victim, "acme")
    ring = KeyRing([f"file:{mine}"])
    for kek in (f"file:{victim}", str(victim), uri, "raw:../victim", "awskms:arn:aws:kms:eu-1:1:key/x", ""):
        with pytest.raises(PolicyRefusedError, match="not among the configured ones"):
            ring.unwrapping("acme", kek)


def test_old_keys_unwrap_while_the_first_wraps(tmp_path: Path) -> None:
    old = generate_encryption_key(tmp_path / "acme.old.kek", "acme")
    new = generate_encryption_key(tmp_path / "acme.kek", "acme")
    ring = KeyRing.parse(f"file:{tmp_path}/{{tenant}}.kek, file:{tmp_path}/{{tenant}}.old.kek")
    assert ring.wrapping("acme").uri == new
    assert ring.unwrapping("acme", old).uri == old
    (tmp_path / "acme.old.kek").unlink()
    assert ring.unwrapping("acme", new).uri == new
    with pytest.raises(SettingsError, match="cannot be opened"):
        ring.unwrapping("acme", old)


def test_no_configured_key_means_a_refusal_that_says_so() -> None:
    with pytest.raises(PolicyRefusedError, match="none is configured"):
        KeyRing.parse(None).unwrapping("acme", "raw:0")


@pytest.mark.parametrize(
    "address", ["acme.kek", "file:", "http://x", "awskms:", "FILE:x", "raw:00", "vault:x", "awskms:key/1", ""]
)
def test_addresses_of_no_known_kind_are_refused(address: str) -> None:
    with pytest.raises(SettingsError):
        provider_from(address, tenant="acme")


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:kms:eu-1:1:key/x",
        "arn:aws:s3:eu-1:123456789012:key/x",
        "arn:aws:kms:eu/..:123456789012:key/x",
    ],
)
def test_only_arns_of_kms_keys_are_accepted(arn: str) -> None:
    with pytest.raises(SettingsError):
        AwsKmsKey(arn)


@pytest.mark.parametrize("tenant", ["../globex", "a/b", "", "A", "{tenant}"])
def test_a_tenant_that_is_no_name_never_becomes_a_path(tmp_path: Path, tenant: str) -> None:
    from loraplex_registry.errors import InvalidReferenceError

    with pytest.raises(InvalidReferenceError):
        provider_from(f"file:{tmp_path}/{{tenant}}.kek", tenant=tenant)


def test_relative_key_files_are_anchored_at_the_settings(tmp_path: Path) -> None:
    text = anchored_addresses("file:keys/a.kek, awskms:arn:aws:kms:r:1:key/x,file:/abs/b.kek", tmp_path)
    assert text == f"file:{tmp_path}/keys/a.kek, awskms:arn:aws:kms:r:1:key/x, file:/abs/b.kek"
    assert file_path("///abs/with%20blank") == Path("/abs/with blank")


names = st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,6}[a-z0-9])?", fullmatch=True)
contexts = st.builds(
    KeyContext,
    names,
    names,
    st.one_of(st.integers(1, 999_999_999), st.just("1.0.0"), st.just("1.0.0-rc.1")),
    st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
)


@given(contexts, contexts)
def test_different_contexts_never_have_equal_bytes(one: KeyContext, two: KeyContext) -> None:
    assert (one == two) == (one.to_bytes() == two.to_bytes()) == (one.to_pairs() == two.to_pairs())


def test_a_destroyed_key_file_is_gone_and_a_link_is_not_followed(tmp_path: Path) -> None:
    path, link = tmp_path / "acme.kek", tmp_path / "link.kek"
    key = _file_key(path)
    held = os.open(path, os.O_RDONLY)
    before = os.pread(held, 4096, 0)
    link.symlink_to(path)
    with pytest.raises(PolicyRefusedError, match="link"):
        FileKey.load(link, tenant="acme").destroy("acme", pending_days=7)
    with pytest.raises(PolicyRefusedError):
        key.destroy("globex", pending_days=7)
    assert "removed" in key.destroy("acme", pending_days=7)
    assert not path.exists()
    after = os.pread(held, 4096, 0)
    os.close(held)
    assert before[:64] not in after
    assert len(after) >= len(before)


def test_a_kms_key_is_destroyed_only_when_tagged_as_the_tenants(kms_key: Callable[[str | None], str]) -> None:
    for tag in (None, "globex"):
        with pytest.raises(PolicyRefusedError, match="tagged"):
            AwsKmsKey(kms_key(tag)).destroy("acme", pending_days=7)
    key = AwsKmsKey(kms_key("acme"))
    wrapped = key.wrap(DEK, CONTEXT)
    assert "refused from now on" in key.destroy("acme", pending_days=7)
    with pytest.raises(StoreRefusedError, match="State"):
        key.unwrap(wrapped, CONTEXT)
