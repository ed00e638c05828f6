"""Encrypted versions on the real engine: the tenant's own answer with its key, a typed refusal without.

The shared server looks for `keys/<tenant>.kek` beside its settings, when a version is loaded. That the plaintext never
lies on its disk is asserted after every test, by the `client` fixture.
"""

import shutil
from pathlib import Path

import pytest

from loraplex_client import AdapterRefusedError, Client, PermissionDeniedError
from loraplex_registry.encryption.kek_file import generate_encryption_key
from loraplex_registry.encryption.key_providers import KeyRing
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Published, Registry
from loraplex_registry.storage.store import open_store
from tests.e2e.conftest import Stage, generate, write_adapter

pytestmark = pytest.mark.engine


def publish_encrypted(server: Stage, ref: str, key: Path, *, seed: int) -> Published:
    """Push the adapter of a seed, encrypted under a key file."""
    parsed = AdapterRef.parse(ref)
    directory = write_adapter(server.base, server.root / f"{parsed.adapter}-{seed}", seed=seed)
    store = open_store(server.url, endpoint_url=server.s3.endpoint_url)
    registry = Registry(store, keys=KeyRing([f"file:{key}"]))
    done = registry.publish(directory, parsed, server.signers[parsed.tenant], server.base)
    server.encrypted.add(done.digest)
    return done


def server_key(server: Stage, tenant: str) -> Path:
    """Where the server looks for a tenant's key."""
    (server.root / "keys").mkdir(exist_ok=True)
    return server.root / "keys" / f"{tenant}.kek"


@pytest.fixture
def acme_key(server: Stage) -> Path:
    """The key of acme, made once; the server has it."""
    path = server_key(server, "acme")
    if not path.exists():
        generate_encryption_key(path, "acme")
    return path


def refusal(client: Client, adapter: str) -> PermissionDeniedError | AdapterRefusedError:
    """The error an adapter is refused with; it tells nothing of the server's files."""
    with pytest.raises((PermissionDeniedError, AdapterRefusedError)) as caught:
        generate(client, adapter)
    assert ".kek" not in str(caught.value)
    return caught.value


def test_an_encrypted_version_answers_as_the_same_adapter_in_clear(
    server: Stage, client: Client, acme_key: Path
) -> None:
    server.publish("acme/in-clear", seed=700)
    sealed = publish_encrypted(server, "acme/sealed", acme_key, seed=700)
    weights = (server.root / "sealed-700" / "adapter_model.safetensors").read_bytes()
    stored = {key: server.read(key) for key in server.keys_of("acme/sealed")}
    assert any("/b/" in key for key in stored)
    assert not any(weights[-256:] in body for body in stored.values()), "nothing lies in the bucket in clear"
    answer = generate(client, "acme/sealed")
    assert answer.header.adapter_digest == sealed.digest
    assert answer.token_ids == generate(client, "acme/in-clear").token_ids
    assert answer.token_ids != generate(client).token_ids


def test_without_the_tenants_key_it_is_refused_and_others_are_served(
    server: Stage, client: Client, acme_key: Path, tmp_path: Path
) -> None:
    publish_encrypted(server, "acme/beside", acme_key, seed=701)
    server.publish("globex/clear", seed=702)
    answers = {name: generate(client, name).token_ids for name in ("acme/beside", "globex/clear")}
    own, place = tmp_path / "globex.kek", server_key(server, "globex")
    generate_encryption_key(own, "globex")
    publish_encrypted(server, "globex/sealed", own, seed=703)
    generate_encryption_key(tmp_path / "second.kek", "globex")
    try:
        for wrong in (
            None,
            acme_key,
            tmp_path / "second.kek",
        ):  # absent; another tenant's; not the one that wrapped it
            if wrong is not None:
                shutil.copy(wrong, place)
            assert refusal(client, "globex/sealed").code == "POLICY_REFUSED"
            assert {name: generate(client, name).token_ids for name in answers} == answers
        shutil.copy(own, place)
        assert generate(client, "globex/sealed").token_ids not in answers.values(), (
            "the key came; no restart needed"
        )
    finally:
        place.unlink()
