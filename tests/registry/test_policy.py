"""The policy file: every key read or refused, the longest match whatever the number of rules, lint, and explain."""

import datetime as dt
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry import cli
from loraplex_registry.errors import PolicyRefusedError
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.storage.store import Store
from loraplex_registry.trust.explain import explain
from loraplex_registry.trust.marks import FrozenMarks, MemoryMarks
from loraplex_registry.trust.policy import Rule, TrustPolicy
from loraplex_registry.trust.policy_lint import lint
from loraplex_registry.trust.verdict import CHECKS
from loraplex_registry.trust.verifier import Verifier
from tests.registry import forge
from tests.registry.conftest import NOW
from tests.registry.test_refs import names

KEYS = ("ci", "ci2", "release", "release2", "security", "builder")
REVOKERS = f"revokers = {forge.key_list('security')}"
FULL = f"""
mode = "audit"
taggers = {forge.key_list("release")}
{REVOKERS}
tags.prod = {{ threshold = 2, taggers = {forge.key_list("release", "release2")}, max_age = "30d" }}
tags."*" = {{ max_age = "90s" }}
encryption = "required"
limits = {{ max_rank = 64, max_bytes = 1000, bases = ["sha256:{"0" * 64}"], min_version = "1.2.0" }}
revocation = {{ max_age = "15m", on_stale = "warn" }}
[[rules.attestations]]
type = "https://slsa.dev/provenance/v1"
keys = {forge.key_list("builder")}
builder = "https://ci"
"""


@pytest.fixture
def load(tmp_path: Path):
    """Write a policy beside the keys and load it."""
    forge.write_keys(tmp_path, *KEYS)

    def read(text: str) -> TrustPolicy:
        (tmp_path / "policy.toml").write_text(text)
        return TrustPolicy.load(tmp_path / "policy.toml")

    return read


def test_everything_a_rule_can_say_is_read(load) -> None:
    (rule,) = load(forge.policy_text(FULL)).rules
    assert rule.tag_rule("prod").threshold == 2
    assert [item.path for item in rule.tag_rule("prod").taggers or ()] == [
        "keys/release.pub",
        "keys/release2.pub",
    ]
    assert rule.tag_rule("prod").max_age_s == 30 * 86400
    assert (rule.tag_rule("canary").threshold, rule.tag_rule("canary").max_age_s) == (1, 90)
    assert [item.path for item in rule.tag_rule("canary").taggers or ()] == ["keys/release.pub"]
    assert (rule.encryption, rule.mode) == ("required", "audit")
    assert (rule.limits.max_rank, rule.limits.max_bytes, rule.limits.min_version) == (64, 1000, "1.2.0")
    assert rule.revocation is not None
    assert (rule.revocation.max_age_s, rule.revocation.on_stale) == (900, "warn")
    assert rule.attestations[0].builder == "https://ci"


def test_defaults_are_taggers_from_keys_and_no_revokers(load) -> None:
    (rule,) = load(forge.policy_text()).rules
    assert rule.taggers == rule.keys
    assert rule.revokers == ()
    assert (rule.encryption, rule.mode, rule.revocation) == ("optional", "enforce", None)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('encryption = "on"', "encryption is one of optional, required, forbidden"),
        ('mode = "off"', "mode is one of enforce, audit"),
        ('mod = "audit"', "did you mean 'mode'"),
        ("taggers = 1", "taggers is not a list of tables"),
        (f"taggers = {forge.key_list('ci', 'ci')}", "names a key twice"),
        ("tags = 1", "tags is not a table"),
        ("tags = { prod = 2 }", "prod is not a table"),
        ("tags = { prod = { treshold = 1 } }", "did you mean 'threshold'"),
        ("tags = { prod = { threshold = 2 } }", "threshold must be 1 to 1"),
        ("tags = { prod = { threshold = true } }", "threshold must be"),
        ("tags = { prod = { threshold = 0 } }", "threshold must be"),
        ('tags = { prod = { max_age = "1 hour" } }', "max_age must be a time"),
        ("tags = { Prod = {} }", "not allowed"),
        (REVOKERS + "\nrevocation = {}", "max_age must be a time"),
        (REVOKERS + '\nrevocation = { max_age = "0h" }', "max_age must be a time"),
        (REVOKERS + '\nrevocation = { max_age = "1h", on_stale = "ignore" }', "on_stale"),
        ('revocation = { max_age = "1h" }', "revokers names nobody"),
        ("limits = { min_version = true }", "min_version"),
        ("limits = { min_version = '1.2' }", "version"),
        ("limits = { max_rank = 0 }", "max_rank"),
        ("attestations = [{ type = 'https://x', keys = [] }]", "no key that may sign"),
        (f"attestations = [{{ keys = {forge.key_list('ci')} }}]", "no type"),
        ("certificates = [{ roots = [], san = 'x' }]", "no list of roots"),
        ("certificates = [{ roots = ['gone.pem'], san = 'x' }]", "gone.pem"),
        ("certificates = [{ roots = ['gone.pem'] }]", "no san"),
        ("certificates = [{ root = ['gone.pem'] }]", "did you mean 'roots'"),
        ("keyless = [{ identity = 'x', issuer = 'y' }]", "no trusted_root"),
        ("keyless = [{ trusted_root = 'gone.json', identity = 'x', issuer = 'y' }]", "gone.json"),
    ],
)
def test_a_value_out_of_shape_is_no_policy(line: str, word: str, load) -> None:
    with pytest.raises(PolicyRefusedError, match=word) as caught:
        load(forge.policy_text(line))
    assert caught.value.code == "POLICY_REFUSED"


def test_dates_the_wrong_way_round_are_no_policy(load) -> None:
    with pytest.raises(PolicyRefusedError, match="to must be later than from"):
        load(forge.policy_text(keys=("ci from 2026-02-01 to 2026-01-01",)))


scopes = st.one_of(
    st.just("**"),
    names.map(lambda tenant: f"{tenant}/**"),
    st.tuples(names, names).map("/".join),
    st.tuples(names, names).map(lambda pair: f"{pair[0]}/{pair[1][:3]}*"),
)
few = st.sampled_from(["acme", "acme2", "a", "orders", "ord", "orders2"])


@given(
    listed=st.lists(
        scopes | st.tuples(few, few).map("/".join) | st.tuples(few, few).map(lambda p: f"{p[0]}/{p[1]}*"),
        unique=True,
        max_size=12,
    ),
    tenant=few | names,
    adapter=few | names,
)
def test_the_look_up_agrees_with_a_scan(listed: list[str], tenant: str, adapter: str) -> None:
    """The law: an exact scope first, then prefixes from the longest; none is left out."""
    policy, name = TrustPolicy(tuple(Rule(scope, ()) for scope in listed)), f"{tenant}/{adapter}"
    exact = [scope for scope in listed if scope == name]
    prefixes = [scope for scope in listed if "*" in scope and name.startswith(scope.rstrip("*"))]
    expected = exact + sorted(prefixes, key=len, reverse=True)
    assert sorted(rule.scope for rule in policy.matching(name)) == sorted(expected)
    found = [len(rule.scope.rstrip("*")) for rule in policy.matching(name)]
    assert found == sorted(found, reverse=True)
    if expected:
        assert policy.rule_for(tenant, adapter).covers(name)


def findings(policy: TrustPolicy, now: dt.datetime = NOW) -> list[str]:
    return [str(finding) for finding in lint(policy, now=now)]


def test_a_sound_policy_has_no_findings(load) -> None:
    text = forge.policy_text(
        f"taggers = {forge.key_list('release')}", REVOKERS, 'revocation = { max_age = "1h" }'
    )
    assert findings(load(text)) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('version = 1\ndefault = "deny"\n', "nothing is trusted"),
        (forge.policy_text(), "there are no revokers"),
        (forge.policy_text(REVOKERS), "can withhold it"),
        (forge.policy_text('mode = "audit"'), "mode is audit"),
        (forge.policy_text(scope="**"), "covers every tenant"),
        (forge.policy_text(keys=("ci to 2020-01-01", "ci2")), "has expired"),
        (forge.policy_text(keys=("ci to 2026-06-20",)), "expires within 30 days"),
        (forge.policy_text(keys=("ci", "ci2 from 2027-01-01")), "does not count yet"),
        (forge.policy_text(keys=("ci to 2020-01-01",)), "nothing is accepted"),
        (forge.policy_text(f"revokers = {forge.key_list('ci')}"), "has the roles keys and revokers"),
        (
            forge.policy_text(
                "tags = { prod = { threshold = 2, "
                f"taggers = {forge.key_list('release to 2020-01-01', 'release2')} }} }}"
            ),
            "2 signatures are needed and 1 of its keys count",
        ),
        (
            forge.policy_text(REVOKERS, 'encryption = "required"')
            + forge.policy_text(scope="acme/orders", head=False),
            'drops what that demands: encryption = "required", revokers',
        ),
        (
            forge.policy_text() + forge.policy_text(scope="globex/**", head=False),
            "counts for 2 tenants: acme, globex",
        ),
        (forge.policy_text("taggers = []"), "no tag is accepted"),
    ],
)
def test_lint_names_what_is_probably_not_meant(text: str, words: str, load) -> None:
    assert any(words in line for line in findings(load(text))), findings(load(text))


@pytest.fixture
def world(tmp_path: Path, load):
    made = forge.Forge(tmp_path)
    record = made.record()
    return made, forge.store_of({**made.objects(record), **forge.tag(record, 3)})


def outcomes(
    store: Store, policy: TrustPolicy, ref: str = "acme/orders@prod", marks: MemoryMarks | None = None
):
    return explain(Registry(store), policy, AdapterRef.parse(ref), marks=marks)


def test_explain_makes_every_check_in_order_and_agrees_with_verify(world, load) -> None:
    _, store = world
    policy = load(forge.policy_text() + forge.policy_text(scope="**", head=False))
    found = outcomes(store, policy, marks=FrozenMarks(MemoryMarks()))
    assert found.trusted
    assert [item.check for item in found.checks] == list(CHECKS)
    assert {item.outcome for item in found.checks} == {"ok", "skipped"}
    assert found.also == ("**",)
    assert any("keys/ci.pub" in line for line in found.lines())
    assert Verifier(Registry(store), policy).verify(AdapterRef.parse("acme/orders@prod")).tag_generation == 3


@pytest.mark.parametrize(
    ("policy", "check", "code"),
    [
        (forge.policy_text(scope="globex/**"), "scope", "POLICY_REFUSED"),
        (forge.policy_text(keys=("ci2",)), "signature", "SIGNATURE_INVALID"),
        (forge.policy_text(keys=("ci to 2020-01-01",)), "key", "EXPIRED"),
        (forge.policy_text(REVOKERS, 'revocation = { max_age = "1h" }'), "revocation list", "EXPIRED"),
        (forge.policy_text(f"taggers = {forge.key_list('release')}"), "tag", "SIGNATURE_INVALID"),
        (forge.policy_text('tags = { "*" = { max_age = "1s" } }'), "tag dates", "EXPIRED"),
        (forge.policy_text('encryption = "required"'), "encryption", "POLICY_REFUSED"),
        (forge.policy_text("limits = { max_rank = 1 }"), "limits", "RANK_TOO_LARGE"),
    ],
)
def test_explain_shows_the_check_that_failed_and_reaches_no_further(
    policy: str, check: str, code: str, world, load
) -> None:
    found = outcomes(world[1], load(policy))
    failed = [item for item in found.checks if item.outcome == "FAILED"]
    assert [(item.check, found.code, found.trusted) for item in failed] == [(check, code, False)]
    after = [item.outcome for item in found.checks[found.checks.index(failed[0]) + 1 :]]
    assert set(after) <= {"not reached"}
    assert found.lines()[0].endswith(f"REFUSED {code}")


def test_explain_remembers_nothing(world, load) -> None:
    marks = MemoryMarks()
    outcomes(world[1], load(forge.policy_text()), marks=FrozenMarks(marks))
    assert marks.seen("acme").marks == {}


def test_audit_mode_accepts_and_says_what_it_let_pass(world, load) -> None:
    made, _ = world
    record = made.record(key="ci2")
    store = forge.store_of({**made.objects(record), **forge.tag(record, keys=("release",))})
    policy = load(forge.policy_text('mode = "audit"', "limits = { max_rank = 1 }", 'encryption = "required"'))
    verified = Verifier(Registry(store), policy, marks=MemoryMarks()).verify(
        AdapterRef.parse("acme/orders@prod")
    )
    assert verified.keyid == ""
    assert "audit mode" in verified.warnings[0]
    reasons = [warning.partition(":")[0] for warning in verified.warnings[1:]]
    assert reasons == ["SIGNATURE_INVALID", "SIGNATURE_INVALID", "POLICY_REFUSED", "RANK_TOO_LARGE"]
    waived = [item.check for item in outcomes(store, policy).checks if item.outcome == "waived"]
    assert waived == ["signature", "tag", "encryption", "limits"]


@pytest.fixture
def command(tmp_path: Path, world, load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    made, _ = world
    record = made.record()
    for key, body in {**made.objects(record), **forge.tag(record), "registry.json": b'{"fmt":1}'}.items():
        path = tmp_path / "registry" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    load(forge.policy_text())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "LORAPLEX_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    place = ["--registry", (tmp_path / "registry").as_uri(), "--policy", str(tmp_path / "policy.toml")]

    def run(*words: str) -> tuple[int, str]:
        code = cli.main([*words, *place])
        return code, capsys.readouterr().out

    return run


def test_the_command_explains_for_people_and_for_programs(command, tmp_path: Path) -> None:
    code, text = command("policy", "explain", "acme/orders@prod")
    assert code == 0
    assert text.startswith("acme/orders@prod  trusted\n")
    assert "keys/ci.pub" in text
    value = json.loads(command("policy", "explain", "acme/orders@prod", "--json")[1])
    assert value["trusted"]
    assert [item["check"] for item in value["checks"]] == list(CHECKS)
    assert not (tmp_path / "home").exists(), "a question leaves no trace"


def test_the_command_checks_a_policy(command, tmp_path: Path) -> None:
    code, text = command("policy", "check")
    assert (code, "there are no revokers" in text) == (0, True)
    assert command("policy", "check", "--strict")[0] == 6
    (tmp_path / "policy.toml").chmod(0o666)
    assert "can be written by others" in command("policy", "check")[1]
    (tmp_path / "policy.toml").write_text("version = 1")
    assert command("policy", "check")[0] == 6
