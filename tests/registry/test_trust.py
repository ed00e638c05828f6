"""The trust policy: which rule decides, what it demands, and that damage means no trust."""

import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.errors import (
    AdapterNotFoundError,
    BaseMismatchError,
    ExpiredError,
    PolicyRefusedError,
    RankTooLargeError,
    RevokedError,
    RollbackError,
    SignatureInvalidError,
)
from loraplex_registry.format.tags import make_tag
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry, Resolved
from loraplex_registry.signing import Signer
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.trust.marks import MemoryMarks
from loraplex_registry.trust.revocations import Revocation
from loraplex_registry.trust.verdict import Rule, TrustPolicy, VerifiedManifest, verify
from loraplex_registry.trust.verifier import Verifier
from loraplex_registry.validation.base import BaseModel
from tests.registry import builders, forge, pki
from tests.registry.conftest import NOW
from tests.registry.test_refs import names

ORDERS = AdapterRef.parse("acme/orders")


@pytest.fixture
def resolved(local_registry: Registry, adapter: Path, signer: Signer, base: BaseModel) -> Resolved:
    local_registry.publish(adapter, ORDERS, signer, base)
    return local_registry.resolve(ORDERS)


def rule(scope: str) -> Rule:
    return Rule(scope, ())


@given(names, names)
def test_an_empty_policy_trusts_nothing(tenant: str, adapter: str) -> None:
    with pytest.raises(PolicyRefusedError) as caught:
        TrustPolicy(()).rule_for(tenant, adapter)
    assert caught.value.code == "POLICY_REFUSED"


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("acme/orders", "acme/orders"),
        ("acme/orders2", "acme/ord*"),
        ("acme/other", "acme/**"),
        ("globex/orders", "**"),
        ("acme2/orders", "**"),
    ],
)
def test_the_longest_scope_decides_alone(name: str, scope: str) -> None:
    policy = TrustPolicy(tuple(rule(text) for text in ("**", "acme/ord*", "acme/orders", "acme/**")))
    assert policy.rule_for(*name.split("/")).scope == scope


@given(names, names, names)
def test_a_tenants_scope_never_covers_another_tenant(mine: str, other: str, adapter: str) -> None:
    policy = TrustPolicy((rule(f"{mine}/**"),))
    if mine == other:
        policy.rule_for(other, adapter)
        return
    with pytest.raises(PolicyRefusedError):
        policy.rule_for(other, adapter)


def test_an_adapter_outside_every_scope_is_refused(
    local_registry: Registry, resolved: Resolved, keys: Path
) -> None:
    policy = builders.acme_policy(keys, tenant="globex")
    with pytest.raises(PolicyRefusedError):
        local_registry.verify(resolved, policy)


def test_a_key_the_rule_does_not_list_is_refused(
    local_registry: Registry, resolved: Resolved, keys: Path
) -> None:
    policy = builders.acme_policy(keys, key="globex")
    with pytest.raises(SignatureInvalidError, match="does not list"):
        local_registry.verify(resolved, policy)


@pytest.mark.parametrize(
    ("dates", "good"),
    [
        ("", True),
        (", from = 2026-06-01", True),
        (", to = 2026-06-02", True),
        (", from = 2026-06-02", False),
        (", to = 2026-06-01", False),
        (", to = 2026-06-01T12:00:00Z", False),
        (", to = 2026-06-01T12:00:01Z", True),
        (", from = 2026-06-01T12:00:00Z", True),
        (", from = 2026-06-01T14:00:00+01:00", False),
    ],
)
def test_a_key_counts_only_within_its_dates(
    dates: str, good: bool, local_registry: Registry, resolved: Resolved, keys: Path
) -> None:
    policy = builders.make_policy(
        keys,
        f'version = 1\ndefault = "deny"\n[[rules]]\nscope = "acme/**"\nkeys = [{{ path = "acme.pub"{dates} }}]\n',
    )
    if good:
        assert local_registry.verify(resolved, policy, now=NOW).manifest.tenant == "acme"
        return
    with pytest.raises(ExpiredError) as caught:
        local_registry.verify(resolved, policy, now=NOW)
    assert caught.value.code == "EXPIRED"


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        ("max_rank = 4", None),
        ("max_rank = 3", RankTooLargeError),
        ("max_bytes = 100", PolicyRefusedError),
        (f'bases = ["sha256:{"0" * 64}"]', PolicyRefusedError),
        ("bases = []", PolicyRefusedError),
    ],
)
def test_a_rules_limits_are_kept(
    limit: str, error: type[Exception] | None, local_registry: Registry, resolved: Resolved, keys: Path
) -> None:
    policy = builders.acme_policy(keys, extra=f"limits = {{ {limit} }}")
    if error is None:
        local_registry.verify(resolved, policy)
        return
    with pytest.raises(error):
        local_registry.verify(resolved, policy)


def test_another_base_is_refused(local_registry: Registry, resolved: Resolved, policy: TrustPolicy) -> None:
    with pytest.raises(BaseMismatchError):
        local_registry.verify(resolved, policy, base_digest="sha256:" + "0" * 64)


def test_ed25519_counts_only_where_the_policy_says_so(
    local_registry: Registry, adapter: Path, keys: Path, base: BaseModel
) -> None:
    with pytest.raises(PolicyRefusedError, match="ed25519"):
        builders.acme_policy(keys, key="acme25519")
    policy = builders.acme_policy(keys, key="acme25519", extra='algorithms = ["ed25519"]')
    local_registry.publish(adapter, ORDERS, builders.load_signer(keys / "acme25519.key"), base)
    assert local_registry.verify(local_registry.resolve(ORDERS), policy).keyid


HEAD = 'version = 1\ndefault = "deny"\n'
KEYS = 'keys = [{ path = "acme.pub" }]\n'


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "version = 1"),
        ("version = 1\n", "deny"),
        ('version = 1\ndefault = "allow"\n', "deny"),
        ('version = 2\ndefault = "deny"\n', "version"),
        ("version = ", "not TOML"),
        (HEAD + "ruels = []\n", "did you mean 'rules'"),
        (HEAD + '[[rules]]\nscoop = "acme/**"\n' + KEYS, "did you mean 'scope'"),
        (HEAD + '[[rules]]\nscope = "acme/**"\n', "at least one key"),
        (HEAD + '[[rules]]\nscope = "acme/**"\nkeys = []\n', "at least one key"),
        (HEAD + '[[rules]]\nscope = "acme"\n' + KEYS, "adapter name"),
        (HEAD + '[[rules]]\nscope = "*/orders"\n' + KEYS, "tenant name"),
        (HEAD + '[[rules]]\nscope = "acme/*x"\n' + KEYS, "adapter name"),
        (HEAD + ('[[rules]]\nscope = "acme/**"\n' + KEYS) * 2, "same scope"),
        (HEAD + '[[rules]]\nscope = "acme/**"\nkeys = [{ path = "gone.pub" }]\n', "gone.pub"),
        (
            HEAD + '[[rules]]\nscope = "acme/**"\nkeys = [{ path = "acme.pub", until = 2026-01-01 }]\n',
            "until",
        ),
        (
            HEAD + '[[rules]]\nscope = "acme/**"\nkeys = [{ path = "acme.pub", to = "2026-01-01" }]\n',
            "without quotes",
        ),
        (
            HEAD + '[[rules]]\nscope = "acme/**"\nkeys = [{ path = "acme.pub", to = 2026-01-01T00:00:00 }]\n',
            "zone",
        ),
        (HEAD + '[[rules]]\nscope = "acme/**"\nkeys = [{ path = "acme.pub", keyid = "00" }]\n', "key id"),
        (HEAD + '[[rules]]\nscope = "acme/**"\nthreshold = 2\n' + KEYS, "threshold"),
        (HEAD + '[[rules]]\nscope = "acme/**"\nalgorithms = ["rsa"]\n' + KEYS, "algorithms"),
        (HEAD + '[[rules]]\nscope = "acme/**"\nlimits = { max_rang = 8 }\n' + KEYS, "max_rank"),
        (HEAD + '[[rules]]\nscope = "acme/**"\nlimits = { max_rank = "8" }\n' + KEYS, "max_rank"),
        (HEAD + '[[rules]]\nscope = "acme/**"\nlimits = { bases = ["x"] }\n' + KEYS, "digest"),
    ],
)
def test_a_policy_that_is_not_understood_is_no_policy(text: str, word: str, keys: Path) -> None:
    with pytest.raises(PolicyRefusedError, match=word):
        builders.make_policy(keys, text)


def test_a_missing_policy_trusts_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        PolicyRefusedError, match=r"nothing is trusted without one; `registry init --tenant NAME`"
    ):
        TrustPolicy.load(tmp_path / "none.toml")


def test_an_unknown_key_of_a_policy_is_answered_with_the_known_ones(keys: Path) -> None:
    with pytest.raises(PolicyRefusedError, match=r"unknown key 'zzz'\. Known are version, default, rules\."):
        builders.make_policy(keys, HEAD + "zzz = 1\n")
    with pytest.raises(PolicyRefusedError, match=r"did you mean 'scope'\? Known are scope, keys, "):
        builders.make_policy(keys, HEAD + '[[rules]]\nscop = "acme/**"\n' + KEYS)


@given(body=st.binary(max_size=200))
def test_random_bytes_are_no_policy(body: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.toml"
    path.write_bytes(body)
    with pytest.raises(PolicyRefusedError):
        TrustPolicy.load(path)


def test_proof_cannot_be_made_by_hand(local_registry: Registry, resolved: Resolved) -> None:
    with pytest.raises(TypeError):
        VerifiedManifest(
            ref=resolved.ref,
            manifest=resolved.record.manifest_unverified(),
            record=resolved.record,
            keyid="0" * 64,
            scope="**",
        )


def test_the_policys_digest_names_its_bytes(keys: Path) -> None:
    first = builders.acme_policy(keys)
    assert first.digest.startswith("sha256:")
    assert first.digest == builders.acme_policy(keys).digest != builders.acme_policy(keys, extra="# x").digest
    assert NOW.tzinfo is dt.UTC


def certified(place: Path, authority: pki.Authority, leaf: pki.Issued) -> tuple[forge.Forge, MemoryStore]:
    """acme/orders@1 signed with a certificate instead of a listed key."""
    made = forge.Forge(place)
    record = made.record()
    files = {file.name: file.sha256 for file in record.manifest_unverified().files}
    files["adapter.manifest.json"] = record.digest.removeprefix("sha256:")
    bundle = pki.sign_with_certificate(files, leaf, authority.intermediate)
    return made, forge.store_of(made.objects(replace(record, bundle=bundle)))


def certificate_policy(
    place: Path, root: pki.Issued, *lines: str, san: str = pki.SAN, dates: str = ""
) -> TrustPolicy:
    """A policy that knows one root and one name, and no key."""
    root.write(place, "root")
    forge.write_keys(place, "security")
    (place / "policy.toml").write_text(
        'version = 1\ndefault = "deny"\n[[rules]]\nscope = "acme/**"\n'
        f'certificates = [{{ roots = ["root.pem"], san = "{san}"{dates} }}]\n' + "\n".join(lines)
    )
    return TrustPolicy.load(place / "policy.toml")


@pytest.fixture(scope="module")
def authority() -> pki.Authority:
    return pki.Authority.make(NOW)


FIRST = AdapterRef.parse("acme/orders@1")


def test_a_certificate_of_a_named_root_and_name_signs_adapters(
    tmp_path: Path, authority: pki.Authority
) -> None:
    leaf = authority.leaf()
    _, store = certified(tmp_path, authority, leaf)
    policy = certificate_policy(tmp_path, authority.root)
    verified = Verifier(Registry(store), policy, now=lambda: NOW).verify(FIRST)
    assert verified.keyid == leaf.signer.keyid


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"san": "spiffe://acme.example/other"}, SignatureInvalidError),
        ({"dates": ", to = 2026-01-01"}, ExpiredError),
        ({"dates": ", from = 2027-01-01"}, ExpiredError),
    ],
)
def test_a_certificate_counts_for_its_name_and_the_policys_dates_alone(
    change: dict[str, str], error: type[Exception], tmp_path: Path, authority: pki.Authority
) -> None:
    _, store = certified(tmp_path, authority, authority.leaf())
    with pytest.raises(error):
        Verifier(
            Registry(store), certificate_policy(tmp_path, authority.root, **change), now=lambda: NOW
        ).verify(FIRST)


def test_a_certificate_is_judged_by_the_clock_and_not_by_its_own_dates(
    tmp_path: Path, authority: pki.Authority
) -> None:
    """Checking the chain at the certificate's own beginning would accept it for ever."""
    _, store = certified(tmp_path, authority, authority.leaf())
    policy = certificate_policy(tmp_path, authority.root)
    with pytest.raises(ExpiredError):
        Verifier(Registry(store), policy, now=lambda: NOW + dt.timedelta(days=91)).verify(FIRST)


def test_a_certificate_of_another_root_and_a_bare_key_are_refused(
    tmp_path: Path, authority: pki.Authority
) -> None:
    made, store = certified(tmp_path, authority, authority.leaf())
    policy = certificate_policy(tmp_path, pki.Authority.make(NOW).root)
    for found in (store, forge.store_of(made.objects(made.record()))):
        with pytest.raises(SignatureInvalidError):
            Verifier(Registry(found), policy, now=lambda: NOW).verify(FIRST)


def test_a_certificate_does_not_count_where_only_keys_are_listed(
    tmp_path: Path, authority: pki.Authority
) -> None:
    _, store = certified(tmp_path, authority, authority.leaf())
    forge.write_keys(tmp_path, "ci")
    (tmp_path / "policy.toml").write_text(forge.policy_text())
    with pytest.raises(SignatureInvalidError):
        Verifier(Registry(store), TrustPolicy.load(tmp_path / "policy.toml"), now=lambda: NOW).verify(FIRST)


def test_a_certified_key_can_be_revoked(tmp_path: Path, authority: pki.Authority) -> None:
    leaf = authority.leaf()
    _, store = certified(tmp_path, authority, leaf)
    policy = certificate_policy(tmp_path, authority.root, f"revokers = {forge.key_list('security')}")
    entry = Revocation("stolen", keyid=leaf.signer.keyid)
    ((key, body),) = forge.revocations(entry).items()
    store.create(key, body)
    with pytest.raises(RevokedError):
        Verifier(Registry(store), policy, now=lambda: NOW).verify(FIRST)


def test_a_statement_beside_the_envelope_is_not_believed(tmp_path: Path) -> None:
    """What is judged is what was signed, even when a program hands over something else with it."""
    made = forge.Forge(tmp_path)
    record, other = made.record(1), made.record(2, seed=1)
    store = forge.store_of({**made.objects(record), **made.objects(other, seed=1), **forge.tag(record)})
    forge.write_keys(tmp_path, "ci")
    (tmp_path / "policy.toml").write_text(forge.policy_text())
    policy, registry = TrustPolicy.load(tmp_path / "policy.toml"), Registry(store)
    resolved = registry.resolve(AdapterRef.parse("acme/orders@prod"))
    assert resolved.tag is not None
    forged = replace(
        resolved,
        version=2,
        digest=other.digest,
        record=other,
        tag=replace(resolved.tag, statement=forge.statement(other, 9), record=other),
    )
    registry.verify(resolved, policy, now=NOW)
    with pytest.raises(SignatureInvalidError, match="another digest"):
        registry.verify(forged, policy, now=NOW)


def test_a_tag_that_names_another_version_than_its_digest_is_refused(tmp_path: Path) -> None:
    made = forge.Forge(tmp_path)
    forge.write_keys(tmp_path, "ci")
    (tmp_path / "policy.toml").write_text(forge.policy_text())
    policy, record = TrustPolicy.load(tmp_path / "policy.toml"), made.record(1)
    signed = make_tag(forge.statement(record, version=2), record, forge.signer("ci"))
    registry = Registry(MemoryStore())
    resolved = Resolved(AdapterRef.parse("acme/orders@prod"), 1, record.digest, record, signed)
    with pytest.raises(SignatureInvalidError, match="signed for version 2"):
        registry.verify(resolved, policy, now=NOW)


def test_a_tag_signature_is_no_adapter_signature_and_the_other_way_round(tmp_path: Path) -> None:
    made = forge.Forge(tmp_path)
    forge.write_keys(tmp_path, "ci", "release")
    (tmp_path / "policy.toml").write_text(forge.policy_text(f"taggers = {forge.key_list('release')}"))
    policy = TrustPolicy.load(tmp_path / "policy.toml")
    for adapter_key, tag_key, good in [
        ("ci", "release", True),
        ("release", "release", False),
        ("ci", "ci", False),
        ("release", "ci", False),
    ]:
        record = made.record(key=adapter_key)
        store = forge.store_of({**made.objects(record), **forge.tag(record, keys=(tag_key,))})
        verifier = Verifier(Registry(store), policy, now=lambda: NOW)
        if good:
            assert verifier.verify(AdapterRef.parse("acme/orders@prod")).keyid
            continue
        with pytest.raises(SignatureInvalidError):
            verifier.verify(AdapterRef.parse("acme/orders@prod"))


def test_a_removal_is_remembered_though_nothing_is_there(tmp_path: Path) -> None:
    made, marks = forge.Forge(tmp_path), MemoryMarks()
    forge.write_keys(tmp_path, "ci")
    (tmp_path / "policy.toml").write_text(forge.policy_text())
    policy, record = TrustPolicy.load(tmp_path / "policy.toml"), made.record()
    ref = AdapterRef.parse("acme/orders@prod")

    def at(objects: forge.Objects) -> Verifier:
        store = forge.store_of({**made.objects(record), **objects})
        return Verifier(Registry(store), policy, marks=marks, now=lambda: NOW)

    at(forge.tag(record, 1)).verify(ref)
    with pytest.raises(AdapterNotFoundError):
        at(forge.tag(None, 2)).verify(ref)
    with pytest.raises(RollbackError):
        at(forge.tag(record, 1)).verify(ref)
    with pytest.raises(SignatureInvalidError):
        at(forge.tag(None, 9, keys=("stranger",))).verify(ref)
    at(forge.tag(record, 3)).verify(ref)


def test_a_pulled_directory_is_not_asked_whether_it_is_encrypted(tmp_path: Path) -> None:
    made = forge.Forge(tmp_path)
    forge.write_keys(tmp_path, "ci")
    (tmp_path / "policy.toml").write_text(forge.policy_text('encryption = "required"'))
    policy, record = TrustPolicy.load(tmp_path / "policy.toml"), made.record()
    asked = {"version": 1, "record": record, "tag": None, "policy": policy, "now": NOW}
    assert verify(FIRST, **asked, at_rest=False).digest == record.digest
    with pytest.raises(PolicyRefusedError):
        verify(FIRST, **asked)
