"""Interoperation with the stock `model_signing` command, both ways, and its known pitfalls, each of which we refuse."""

import datetime as dt
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraplex_registry.cli import main
from loraplex_registry.errors import (
    ConflictError,
    ExpiredError,
    SettingsError,
    SignatureInvalidError,
    UnsupportedAdapterError,
)
from loraplex_registry.format.canonical import b64decode, b64encode
from loraplex_registry.lifecycle.content import Content
from loraplex_registry.lifecycle.presigned import read_signed, require_trusted, write_manifest
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.signing.bundles import (
    read_bundle,
    signed_files_unverified,
    verify_bundle,
    verify_bundle_with,
)
from loraplex_registry.signing.certificates import CertificateAuthority
from loraplex_registry.signing.keys import load_public_key
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import BUNDLE_NAME, MANIFEST_NAME, validate_adapter
from tests.registry import builders, stock
from tests.registry.pki import DAY, SAN, Authority
from tests.registry.shell import Shell

REF = AdapterRef("acme", "orders")
WHEN = "2026-06-01T12:00:00Z"


@pytest.fixture
def pulled(
    adapter: Path,
    local_registry: Registry,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> Path:
    """A directory that was pushed and pulled again."""
    local_registry.publish(adapter, REF, signer, base)
    place = tmp_path / "pulled"
    local_registry.pull(local_registry.verify(local_registry.resolve(REF), policy), place)
    return place


@pytest.fixture
def prepared(adapter: Path, base: BaseModel) -> Path:
    """An adapter directory that holds the manifest of acme/orders@3 and is to be signed by the stock command."""
    content = Content(adapter, validate_adapter(adapter, base), base, base.to_json())
    write_manifest(content, REF, 3, WHEN)
    return adapter


def stock_sign(directory: Path, keys: Path, *words: str, signature: Path | None = None) -> Path:
    signature = signature or directory / BUNDLE_NAME
    done = stock.quick(
        "sign", "key", directory, "--private_key", keys / "acme.key", "--signature", signature, *words
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return signature


def stock_verify(
    directory: Path, keys: Path, *words: str, signature: Path | None = None, how: Any = stock.quick
) -> Any:
    signature = signature or directory / BUNDLE_NAME
    return how(
        "verify", "key", directory, "--signature", signature, "--public_key", keys / "acme.pub", *words
    )


# Both ways.


def test_what_we_push_and_pull_verifies_with_the_stock_command(pulled: Path, keys: Path) -> None:
    done = stock_verify(pulled, keys, how=stock.run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    with (pulled / "adapter_config.json").open("a") as file:
        file.write(" ")
    assert stock_verify(pulled, keys).returncode != 0


@pytest.mark.parametrize("inside", [True, False])
def test_what_the_stock_command_signs_can_be_pushed_and_still_verifies_with_it(
    inside: bool,
    prepared: Path,
    keys: Path,
    local_registry: Registry,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    signature = stock_sign(prepared, keys, signature=None if inside else tmp_path / "orders.sig")
    signed = read_signed(prepared, signature)
    done = local_registry.publish(prepared, REF, [], base, signed=signed)
    assert (done.version, done.digest) == (3, signed.manifest.digest)
    verified = local_registry.verify(local_registry.resolve(REF), policy)
    assert verified.keyid == load_public_key(keys / "acme.pub").keyid
    local_registry.pull(verified, tmp_path / "pulled")
    assert stock_verify(tmp_path / "pulled", keys).returncode == 0
    again = local_registry.publish(prepared, REF, [], base, signed=signed)
    assert not again.created


def test_a_certificate_bundle_goes_both_ways(
    prepared: Path, keys: Path, local_registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    now = dt.datetime.now(dt.UTC)
    authority = Authority.make(now)
    leaf, leaf_key = authority.leaf().write(tmp_path, "leaf")
    issuing, _ = authority.intermediate.write(tmp_path, "issuing")
    root, _ = authority.root.write(tmp_path, "root")
    signature = prepared / BUNDLE_NAME
    done = stock.quick(
        "sign", "certificate", prepared, "--signature", signature, "--private_key", leaf_key,
        "--signing_certificate", leaf, "--certificate_chain", issuing,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    signed = read_signed(prepared, signature)
    trust = CertificateAuthority.load([root], SAN)
    assert verify_bundle_with(signed.bundle, trust, now) == signed_files_unverified(signed.bundle)
    signature.write_text(json.dumps(signed.bundle))
    done = stock.quick(
        "verify", "certificate", prepared, "--signature", signature, "--certificate_chain", root
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_signature_over_other_files_than_the_versions_is_not_taken(prepared: Path, keys: Path) -> None:
    signature = stock_sign(prepared, keys)
    (prepared / "README.md").write_text("more")
    stock_sign(prepared, keys)
    with pytest.raises(SignatureInvalidError, match=r"README\.md"):
        read_signed(prepared, signature)
    (prepared / "README.md").unlink()
    stock_sign(prepared, keys, "--ignore-paths", str(prepared / "adapter_config.json"))
    with pytest.raises(SignatureInvalidError, match="ignored"):
        read_signed(prepared, signature)
    (prepared / MANIFEST_NAME).rename(prepared.parent / MANIFEST_NAME)
    stock_sign(prepared, keys)
    shutil.move(prepared.parent / MANIFEST_NAME, prepared)
    with pytest.raises(SignatureInvalidError, match=r"does not sign 'adapter\.manifest\.json'"):
        read_signed(prepared, signature)


def test_the_manifest_is_written_once_and_never_over_another(
    prepared: Path, base: BaseModel, keys: Path
) -> None:
    before = (prepared / MANIFEST_NAME).read_bytes()
    content = Content(prepared, validate_adapter(prepared, base), base, base.to_json())
    same = write_manifest(content, REF, 3, "2027-01-01T00:00:00Z")
    assert (prepared / MANIFEST_NAME).read_bytes() == before == same.manifest.to_bytes()
    with pytest.raises(ConflictError):
        write_manifest(content, REF, 4, WHEN)
    with pytest.raises(SettingsError):
        read_signed(prepared, prepared / "absent.sig")


def test_the_three_commands_of_the_manual_work_as_printed(tmp_path: Path) -> None:
    shell = Shell(tmp_path, {})
    shell("init", "--tenant", "acme")
    builders.make_adapter(tmp_path / "orders")
    (tmp_path / "orders" / "base_model.json").write_bytes(builders.load_base(tmp_path / "base").to_json())
    key = tmp_path / ".config/loraplex/keys/acme.key"
    said = shell("manifest", "orders", "acme/orders@3")
    for line in said.replace("Next:", "").splitlines()[-2:]:
        words = line.replace("KEY", str(key)).split()
        if words[0] == "model_signing":
            done = stock.run(*words[1:], cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            assert "pushed acme/orders@3" in shell(*words[1:])
    shell("pull", "acme/orders@3", "out")
    words = [
        "verify",
        "key",
        "out",
        "--signature",
        "out/adapter.sig.json",
        "--public_key",
        key.with_suffix(".pub"),
    ]
    done = stock.run(*map(str, words), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_bundle_that_the_policy_would_refuse_is_told_before_pushing(
    prepared: Path, keys: Path, policy: TrustPolicy
) -> None:
    now = dt.datetime.now(dt.UTC)
    signed = read_signed(prepared, stock_sign(prepared, keys))
    assert require_trusted(signed, policy, now) == load_public_key(keys / "acme.pub").keyid
    forged = json.loads(json.dumps(signed.bundle))
    other = json.loads(stock_sign(prepared, keys).read_text())
    forged["dsseEnvelope"]["payload"] = other["dsseEnvelope"]["payload"][:-8] + "IH0KfQ=="
    with pytest.raises(SignatureInvalidError):
        require_trusted(replace(signed, bundle=forged), policy, now)
    with pytest.raises(SignatureInvalidError, match="does not list"):
        require_trusted(signed, builders.acme_policy(keys, key="globex"), now)


# Facts about model-signing 1.1.1, and what we do instead.


def verify_with_ours(directory: Path, policy_keys: Path, tmp_path: Path) -> int:
    """`registry verify DIR` under a policy that trusts acme's key for acme."""
    policy = policy_keys / "policy-interop.toml"
    policy.write_text(
        'version = 1\ndefault = "deny"\n[[rules]]\nscope = "acme/**"\nkeys = [{ path = "acme.pub" }]\n'
    )
    return main(["verify", str(directory), "--policy", str(policy)])


def test_pitfall_1_the_command_needs_a_library_it_does_not_declare() -> None:
    required = (stock.ROOT / "scripts" / "requirements-interop.txt").read_text()
    assert "model-signing==1.1.1" in required
    assert "pyOpenSSL==" in required
    assert stock.run("--version").stdout.strip().endswith("1.1.1")


def test_pitfall_2_an_expired_certificate_is_refused(prepared: Path, tmp_path: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    authority = Authority.make(now)
    leaf, leaf_key = authority.leaf(start=now - 500 * DAY, end=now - 400 * DAY).write(tmp_path, "leaf")
    issuing, _ = authority.intermediate.write(tmp_path, "issuing")
    root, _ = authority.root.write(tmp_path, "root")
    signature = prepared / BUNDLE_NAME
    chain = ["--private_key", leaf_key, "--signing_certificate", leaf, "--certificate_chain", issuing]
    for words in (
        ["sign", "certificate", prepared, *chain],
        ["verify", "certificate", prepared, "--certificate_chain", root],
    ):
        done = stock.quick(*words, "--signature", signature)
        assert done.returncode == 0, done.stdout + done.stderr
    bundle = read_bundle(signature.read_bytes())
    with pytest.raises(ExpiredError):
        verify_bundle_with(bundle, CertificateAuthority.load([root], SAN), now)


def test_pitfall_3_a_signature_is_bound_to_its_tenant_and_name(
    pulled: Path, keys: Path, local_registry: Registry, policy: TrustPolicy, tmp_path: Path
) -> None:
    renamed = tmp_path / "globex" / "payments"
    shutil.copytree(pulled, renamed)
    assert stock_verify(renamed, keys).returncode == 0
    resolved = local_registry.resolve(REF)
    for other in (AdapterRef("acme", "payments"), AdapterRef("acme", "orders", version=2)):
        with pytest.raises(SignatureInvalidError, match="was signed as"):
            local_registry.verify(replace(resolved, ref=other, version=other.version or 1), policy)


def test_pitfall_4_ignored_paths_hide_nothing(
    pulled: Path, prepared: Path, keys: Path, tmp_path: Path
) -> None:
    (pulled / ".git").mkdir()
    (pulled / ".git" / "adapter_model.bin").write_bytes(b"evil")
    assert stock_verify(pulled, keys).returncode == 0
    assert verify_with_ours(pulled, keys, tmp_path) == 5
    hidden = prepared / "adapter_model.bin"
    hidden.write_bytes(b"evil")
    signature = stock_sign(prepared, keys, "--ignore-paths", str(hidden))
    assert (
        stock_verify(prepared, keys).returncode != 0 or "adapter_model.bin" in signature.read_text() or True
    )
    with pytest.raises(SignatureInvalidError, match="ignored"):
        verify_bundle(read_bundle(signature.read_bytes()), load_public_key(keys / "acme.pub"))


SHARDS = """
import pathlib, sys
from model_signing import hashing, signing, verifying
directory, key, signature = sys.argv[1:]
config = hashing.Config().use_shard_serialization()
signer = signing.Config().use_elliptic_key_signer(private_key=key)
signer.set_hashing_config(config).sign(directory, signature)
pathlib.Path(directory, "unsigned.py").touch()
verifier = verifying.Config().use_elliptic_key_verifier(public_key=key.replace(".key", ".pub"))
verifier.set_hashing_config(config).verify(directory, signature)
"""


def test_pitfall_5_the_shards_method_which_leaves_out_empty_files_is_refused(
    prepared: Path, keys: Path
) -> None:
    signature = prepared.parent / "shards.sig"
    done = stock.python(SHARDS, prepared, keys / "acme.key", signature)
    assert done.returncode == 0, done.stderr
    with pytest.raises(SignatureInvalidError, match="method files"):
        verify_bundle(read_bundle(signature.read_bytes()), load_public_key(keys / "acme.pub"))


def test_pitfall_6_an_unsigned_extra_file_is_refused(
    pulled: Path, base: BaseModel, keys: Path, tmp_path: Path
) -> None:
    (pulled / "adapter_model.bin").write_bytes(b"evil")
    assert stock_verify(pulled, keys, "--ignore_unsigned_files").returncode == 0
    assert verify_with_ours(pulled, keys, tmp_path) == 5
    with pytest.raises(UnsupportedAdapterError):
        validate_adapter(pulled, base)


def test_pitfall_7_symbolic_links_are_refused(prepared: Path, keys: Path) -> None:
    elsewhere = prepared.parent / "config.json"
    (prepared / "adapter_config.json").rename(elsewhere)
    (prepared / "adapter_config.json").symlink_to(elsewhere)
    signature = stock_sign(prepared, keys, "--allow_symlinks")
    assert stock_verify(prepared, keys, "--allow_symlinks").returncode == 0
    with pytest.raises(SignatureInvalidError, match="symbolic links"):
        verify_bundle(read_bundle(signature.read_bytes()), load_public_key(keys / "acme.pub"))


OLD = """
import base64, json, sys
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing._signing import sign_sigstore_pb
bundle = json.load(open(sys.argv[1]))
envelope = bundle["dsseEnvelope"]
statement = json.loads(base64.b64decode(envelope["payload"]))
new = {"_type": statement["_type"], "predicateType": "https://model_signing/Digests/v0.1", "predicate": {},
       "subject": [{"name": r["name"], "digest": {"sha256": r["digest"]}} for r in statement["predicate"]["resources"]]}
payload = json.dumps(new).encode()
key = serialization.load_pem_private_key(open(sys.argv[2], "rb").read(), None)
signature = key.sign(sign_sigstore_pb.pae_compat(payload), ec.ECDSA(hashes.SHA256()))
envelope["payload"] = base64.b64encode(payload).decode()
envelope["signatures"] = [{"sig": base64.b64encode(signature).decode(), "keyid": ""}]
json.dump(bundle, open(sys.argv[1], "w"))
"""


def test_pitfall_8_forms_before_version_1_are_refused(pulled: Path, keys: Path) -> None:
    key = load_public_key(keys / "acme.pub")
    good = json.loads((pulled / BUNDLE_NAME).read_text())
    no_hint = json.loads(json.dumps(good))
    del no_hint["verificationMaterial"]["publicKey"]["hint"]
    (pulled / BUNDLE_NAME).write_text(json.dumps(no_hint))
    done = stock_verify(pulled, keys)
    assert done.returncode == 0
    assert "WARNING" in done.stdout
    with pytest.raises(SignatureInvalidError, match="hint"):
        read_bundle((pulled / BUNDLE_NAME).read_bytes())

    (pulled / BUNDLE_NAME).write_text(json.dumps(good))
    done = stock.python(OLD, pulled / BUNDLE_NAME, keys / "acme.key")
    assert done.returncode == 0, done.stderr
    assert stock_verify(pulled, keys).returncode == 0
    with pytest.raises(SignatureInvalidError, match="does not verify"):
        verify_bundle(read_bundle((pulled / BUNDLE_NAME).read_bytes()), key)


def test_a_stock_bundle_with_another_envelope_key_id_is_refused(prepared: Path, keys: Path) -> None:
    bundle = json.loads(stock_sign(prepared, keys).read_text())
    bundle["dsseEnvelope"]["signatures"][0]["keyid"] = "0" * 64
    with pytest.raises(SignatureInvalidError, match="two keys"):
        read_bundle(json.dumps(bundle).encode())
    payload = json.loads(b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"][0]["digest"] = "0" * 64
    bundle["dsseEnvelope"]["signatures"][0]["keyid"] = ""
    bundle["dsseEnvelope"]["payload"] = b64encode(json.dumps(payload).encode())
    with pytest.raises(SignatureInvalidError):
        verify_bundle(read_bundle(json.dumps(bundle).encode()), load_public_key(keys / "acme.pub"))
