"""The revocation list: only revokers extend it, nothing comes off it, no concurrent entry is lost, age is judged."""

import datetime as dt
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry import cli
from loraplex_registry.errors import (
    ConflictError,
    DamagedError,
    ExpiredError,
    PolicyRefusedError,
    RevokedError,
    RollbackError,
    SignatureInvalidError,
    StaleRevocationError,
    StoreUnavailableError,
)
from loraplex_registry.format import layout
from loraplex_registry.format.canonical import StrictJsonError
from loraplex_registry.format.moments import parse_moment, written
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Store
from loraplex_registry.trust import revoking
from loraplex_registry.trust.marks import MemoryMarks
from loraplex_registry.trust.policy import TrustedKey
from loraplex_registry.trust.revocations import (
    ENTRIES_MAX,
    Revocation,
    RevocationList,
    parse_revocations,
    poll,
    verify_revocations,
)
from loraplex_registry.trust.revoking import append
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.trust.verifier import Verifier
from tests.registry import forge
from tests.registry.conftest import NOW

REVOKERS = [TrustedKey(forge.signer("security").public_key)]
DIGEST = "sha256:" + "1" * 64
KEYID = "2" * 64
digests = st.text("0123456789abcdef", min_size=64, max_size=64).map(lambda text: f"sha256:{text}")
moments = st.sampled_from(["", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"])
entries = st.one_of(
    st.builds(lambda digest: Revocation("r", digest=digest), digests),
    st.builds(lambda digest, since: Revocation("r", keyid=digest[7:], since=since), digests, moments),
)


def revoke(store: Store, *items: Revocation, key: str = "security", **options: object) -> tuple[object, bool]:
    options = {"revokers": REVOKERS, "now": NOW, **options}
    return append(store, "acme", items, forge.signer(key), **options)


@given(items=st.lists(entries, max_size=8))
def test_what_is_written_is_read_again(items: list[Revocation]) -> None:
    known = RevocationList("acme", 3, "0" * 64, written(NOW), "", ())
    made = replace(known, entries=known.merged(items))
    assert RevocationList.from_bytes(made.to_bytes()) == made
    assert made.merged(items) == made.entries, "adding the same again changes nothing"


@given(first=st.lists(entries, max_size=6), then=st.lists(entries, max_size=6), when=moments)
def test_a_longer_list_refuses_whatever_a_shorter_one_refused(
    first: list[Revocation], then: list[Revocation], when: str
) -> None:
    empty = RevocationList("acme", 1, "", written(NOW), "", ())
    shorter = replace(empty, entries=empty.merged(first))
    longer = replace(empty, entries=shorter.merged(then))
    at = parse_moment(when) if when else None
    for entry in first:
        if refuses(shorter, entry, at):
            assert refuses(longer, entry, at)


def refuses(listed: RevocationList, entry: Revocation, at: dt.datetime | None) -> bool:
    try:
        listed.check(entry.digest, entry.keyid or "", at)
    except RevokedError:
        return True
    return False


def test_an_entry_counts_for_its_version_or_key_alone() -> None:
    empty = RevocationList("acme", 1, "", written(NOW), "", ())
    since = "2026-06-01T12:00:00Z"
    listed = replace(
        empty,
        entries=empty.merged(
            [Revocation("bad", digest=DIGEST), Revocation("lost", keyid=KEYID, since=since)]
        ),
    )
    with pytest.raises(RevokedError, match="bad") as caught:
        listed.check(DIGEST, "3" * 64)
    assert (caught.value.code, caught.value.exit_code) == ("REVOKED", 6)
    with pytest.raises(RevokedError, match="lost"):
        listed.check(None, KEYID, NOW)
    with pytest.raises(RevokedError):
        listed.check(None, KEYID, None)
    listed.check("sha256:" + "9" * 64, KEYID, NOW - dt.timedelta(seconds=1))


def test_the_stricter_of_two_entries_stays() -> None:
    empty = RevocationList("acme", 1, "", written(NOW), "", ())
    late, early = (Revocation("x", keyid=KEYID, since=f"2026-0{month}-01T00:00:00Z") for month in (6, 5))
    ever = Revocation("x", keyid=KEYID)
    assert replace(empty, entries=empty.merged([late])).merged([early]) == (early,)
    assert replace(empty, entries=empty.merged([early])).merged([late]) == (early,)
    assert replace(empty, entries=empty.merged([ever])).merged([early]) == (ever,)


def test_a_list_begins_grows_and_chains(store: Store) -> None:
    marks = MemoryMarks()
    first, changed = revoke(store, Revocation("bad", digest=DIGEST), marks=marks)
    assert changed
    assert revoke(store, Revocation("again", digest=DIGEST), marks=marks)[1] is False
    second, _ = revoke(store, Revocation("lost", keyid=KEYID), marks=marks)
    assert (first.statement.serial, second.statement.serial) == (1, 2)
    assert second.statement.prev == first.statement.sha256
    assert {entry.subject for entry in second.statement.entries} == {DIGEST, KEYID}
    refreshed, changed = revoke(store, refresh=True, now=NOW + dt.timedelta(hours=1), marks=marks)
    assert changed
    assert refreshed.statement.entries == second.statement.entries
    assert refreshed.statement.issued == "2026-06-01T13:00:00Z"


def test_of_many_writers_at_once_no_entry_is_lost(store: Store) -> None:
    found: list[BaseException] = []

    def work(number: int) -> None:
        try:
            revoke(store, Revocation("bad", digest="sha256:" + f"{number:064x}"))
        except ConflictError:
            found.append(ConflictError("busy"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listed = poll(store, "acme")
    assert listed is not None
    assert len(listed.statement.entries) == 6 - len(found)
    assert listed.statement.serial == 6 - len(found)


def test_a_poll_without_change_brings_no_body(store: Store) -> None:
    assert poll(store, "acme") is None
    revoke(store, refresh=True)
    first = poll(store, "acme")
    assert poll(store, "acme", first) is first
    revoke(store, Revocation("bad", digest=DIGEST))
    again = poll(store, "acme", first)
    assert again is not None
    assert again.statement.serial == 2


def test_only_a_revoker_may_write(store: Store) -> None:
    with pytest.raises(PolicyRefusedError, match="not among the revokers"):
        revoke(store, Revocation("bad", digest=DIGEST), key="ci")
    assert poll(store, "acme") is None


def test_a_forged_or_older_list_is_never_signed_on_top_of() -> None:
    marks = MemoryMarks()
    forged = forge.store_of(forge.revocations(keys=("ci",)))
    with pytest.raises(SignatureInvalidError):
        revoke(forged, Revocation("bad", digest=DIGEST))
    revoke(MemoryStore(), Revocation("bad", digest=DIGEST), marks=marks)
    revoke(forge.store_of(forge.revocations(serial=7)), refresh=True, marks=marks)
    for older in (forge.revocations(serial=3), {}):
        with pytest.raises(RollbackError):
            revoke(forge.store_of(older), Revocation("bad", digest=DIGEST), marks=marks)


def test_a_full_list_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [Revocation("r" * 120, digest=f"sha256:{number:064x}") for number in range(ENTRIES_MAX)]
    store = MemoryStore()
    revoke(store, *many)
    with pytest.raises(ConflictError, match="full"):
        revoke(store, Revocation("one more", digest=DIGEST))
    monkeypatch.setattr(revoking, "PAYLOAD_BYTES_MAX", 10)
    with pytest.raises(ConflictError, match="full"):
        revoke(MemoryStore(), Revocation("x", digest=DIGEST))


def test_a_list_is_too_old_by_its_age_or_by_its_own_word() -> None:
    listed = RevocationList("acme", 1, "", "2026-06-01T11:00:00Z", "2026-06-01T12:30:00Z", ())
    listed.check_fresh(NOW, max_age_s=3600)
    with pytest.raises(StaleRevocationError) as caught:
        listed.check_fresh(NOW + dt.timedelta(seconds=1), max_age_s=3600)
    assert caught.value.code == "EXPIRED"
    with pytest.raises(StaleRevocationError):
        listed.check_fresh(NOW + dt.timedelta(minutes=30), max_age_s=99_999)


@pytest.mark.parametrize(
    "change",
    [
        {"serial": 0},
        {"serial": True},
        {"prev": "0" * 64},
        {"issued": "2026-06-01"},
        {"issued": "2026-13-01T00:00:00Z"},
        {"expires": "2026-01-01T00:00:00Z"},
        {"tenant": "../acme"},
        {"schema": "loraplex.revocations/2"},
        {"entries": {}},
        {"entries": [{"digest": DIGEST, "reason": ""}]},
        {"entries": [{"digest": DIGEST, "reason": "x", "since": ""}]},
        {"entries": [{"digest": DIGEST, "keyid": KEYID, "reason": "x", "since": ""}]},
        {"entries": [{"keyid": KEYID, "reason": "x"}]},
        {"entries": [{"keyid": KEYID.upper().replace("2", "A"), "reason": "x", "since": ""}]},
        {"entries": [{"digest": DIGEST, "reason": "x"}] * 2},
        {"entries": [{"reason": "x"}]},
        {"entries": [{"digest": DIGEST, "reason": "x" * 121}]},
        {"extra": 1},
    ],
)
def test_a_list_out_of_shape_is_refused(change: dict[str, object]) -> None:
    from loraplex_registry.format.canonical import canonical

    good = json.loads(RevocationList("acme", 1, "", written(NOW), "", ()).to_bytes())
    RevocationList.from_bytes(canonical(good))
    with pytest.raises(SignatureInvalidError):
        RevocationList.from_bytes(canonical({**good, **change}))


@pytest.mark.parametrize(
    "text", ["", "2026-01-01T00:00:00", "2026-01-01T00:00:00+00:00", "2026-02-30T00:00:00Z", 1]
)
def test_a_time_has_one_spelling(text: object) -> None:
    with pytest.raises(StrictJsonError):
        parse_moment(text)


def test_a_time_is_read_as_it_was_written() -> None:
    assert parse_moment(written(NOW)) == NOW
    assert written(dt.datetime(2026, 6, 1, 14, tzinfo=dt.timezone(dt.timedelta(hours=2)))) == written(NOW)


def test_a_key_outside_its_dates_revokes_nothing() -> None:
    (body,) = forge.revocations().values()
    found = parse_revocations(body, tenant="acme")
    past = [replace(REVOKERS[0], valid_to=NOW)]
    with pytest.raises(ExpiredError):
        verify_revocations(found, "acme", past, now=NOW)
    with pytest.raises(DamagedError):
        parse_revocations(body + b" ", tenant="acme")


def world(tmp_path: Path, *lines: str) -> tuple[forge.Forge, MemoryStore, TrustPolicy]:
    made = forge.Forge(tmp_path)
    forge.write_keys(tmp_path, "ci", "security")
    (tmp_path / "policy.toml").write_text(
        forge.policy_text(f"revokers = {forge.key_list('security')}", *lines)
    )
    return made, forge.store_of(made.objects(made.record())), TrustPolicy.load(tmp_path / "policy.toml")


def test_a_revocation_reaches_whoever_polls(tmp_path: Path) -> None:
    made, store, policy = world(tmp_path)
    seconds = [0.0]
    verifier = Verifier(
        Registry(store), policy, marks=MemoryMarks(), refresh_s=60, clock=lambda: seconds[0], now=lambda: NOW
    )
    ref = AdapterRef.parse("acme/orders@1")
    assert verifier.verify(ref).revocation_serial is None
    revoke(store, Revocation("bad", digest=made.record().digest))
    seconds[0] = 59.9
    verifier.verify(ref)
    seconds[0] = 60.0
    with pytest.raises(RevokedError):
        verifier.verify(ref)


def test_a_silent_storage_is_survived_for_as_long_as_the_policy_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store, policy = world(tmp_path, 'revocation = { max_age = "1h" }')
    revoke(store, refresh=True)
    now = [NOW]
    registry = Registry(store)
    resolved = registry.resolve(AdapterRef.parse("acme/orders@1"))
    verifier = Verifier(registry, policy, refresh_s=0, now=lambda: now[0])
    verifier.decide(resolved)

    def silent(*_: object) -> None:
        raise StoreUnavailableError("silent")

    monkeypatch.setattr(registry, "revocations", silent)
    now[0] = NOW + dt.timedelta(hours=1)
    verifier.decide(resolved)
    now[0] += dt.timedelta(seconds=1)
    with pytest.raises(StaleRevocationError):
        verifier.decide(resolved)
    with pytest.raises(StoreUnavailableError):
        Verifier(registry, policy).decide(resolved)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `registry` on a registry with acme/orders@prod; the revoker's key is security.key."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    made = forge.Forge(tmp_path)
    record = made.record()
    for key, body in {**made.objects(record), **forge.tag(record), "registry.json": b'{"fmt":1}'}.items():
        path = tmp_path / "registry" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    forge.write_keys(tmp_path, "ci", "security")
    (tmp_path / "policy.toml").write_text(forge.policy_text(f"revokers = {forge.key_list('security')}"))
    for name in ("ci", "security"):
        private = forge._Seeded(name, "ed25519").private
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{name}.key").write_bytes(pem)
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "LORAPLEX_REGISTRY", "LORAPLEX_KEY_PASSPHRASE_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = [
        "--registry",
        (tmp_path / "registry").as_uri(),
        "--policy",
        str(tmp_path / "policy.toml"),
        "--json",
    ]

    def run(*words: str) -> tuple[int, dict]:
        code = cli.main([*words, *place])
        return code, json.loads(capsys.readouterr().out)

    run.key = str(tmp_path / "security.key")  # type: ignore[attr-defined]
    run.digest = record.digest  # type: ignore[attr-defined]
    return run


def test_the_command_revokes_a_version_and_the_next_verify_refuses(command) -> None:
    assert command("verify", "acme/orders@prod")[0] == 0
    assert command("revoke", "--list", "acme")[1]["serial"] is None
    code, value = command("revoke", "acme/orders@prod", "--reason", "leaked data", "--key", command.key)
    assert (code, value["serial"], value["changed"]) == (0, 1, True)
    assert value["entries"] == [{"digest": command.digest, "reason": "leaked data"}]
    code, value = command("verify", "acme/orders@prod")
    assert (code, value["error"]["code"]) == (6, "REVOKED")
    assert (
        command("revoke", "acme/orders@1", "--reason", "again", "--key", command.key)[1]["changed"] is False
    )
    assert (
        command("revoke", "--refresh", "acme", "--expires", "30d", "--key", command.key)[1]["expires"]
        is not None
    )
    assert command("revoke", "--list", "acme")[1]["serial"] == 2


def test_the_command_revokes_a_key(command) -> None:
    keyid = forge.signer("ci").keyid
    words = ["revoke", "--keyid", keyid, "--tenant", "acme", "--reason", "stolen", "--key", command.key]
    assert command(*words, "--since", "2027-01-01")[1]["entries"][0]["since"] == "2027-01-01T00:00:00Z"
    assert command("verify", "acme/orders@1")[0] == 0
    assert command(*words)[1]["entries"][0]["since"] == ""
    assert command("verify", "acme/orders@1")[1]["error"]["code"] == "REVOKED"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["revoke"], 2),
        (["revoke", "acme/orders@1"], 2),
        (["revoke", "acme/orders@1", "--list", "acme"], 2),
        (["revoke", "--keyid", "xyz", "--tenant", "acme", "--reason", "x"], 2),
        (["revoke", "--keyid", "0" * 64, "--tenant", "acme", "--reason", "x", "--since", "soon"], 2),
        (["revoke", "--refresh", "globex"], 2),
        (["revoke", "--refresh", "acme", "--expires", "soon"], 2),
        (["revoke", "acme/none@1", "--reason", "x"], 3),
    ],
)
def test_the_command_says_what_is_missing(words: list[str], code: int, command) -> None:
    assert command(*words, "--key", command.key)[0] == code


def test_the_command_refuses_a_key_that_is_no_revoker(command) -> None:
    key = command.key.replace("security", "ci")
    assert (
        command("revoke", "acme/orders@1", "--reason", "x", "--key", key)[1]["error"]["code"]
        == "POLICY_REFUSED"
    )


def test_the_list_lies_where_the_layout_says() -> None:
    assert list(forge.revocations()) == [layout.revocations_key("acme")]
