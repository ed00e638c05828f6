"""The trust policy: which rule decides, what it demands, and that damage means no trust."""

import datetime as dt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.base import BaseModel
from loraplex_registry.errors import (
    BaseMismatchError,
    ExpiredError,
    PolicyRefusedError,
    RankTooLargeError,
    SignatureInvalidError,
)
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry, Resolved
from loraplex_registry.signing import Signer
from loraplex_registry.trust import Rule, TrustPolicy, VerifiedManifest
from tests.registry import builders
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
    with pytest.raises(PolicyRefusedError, match="nothing is trusted"):
        TrustPolicy.load(tmp_path / "none.toml")


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
