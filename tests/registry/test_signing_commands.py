"""Keys, rotation, signing again, attestations and foreign signatures, through the real command."""

import contextlib
import datetime as dt
import io
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraplex_registry.cli import main
from loraplex_registry.signing.keys import generate_key, load_public_key
from loraplex_registry.trust.policy import TrustPolicy
from loraplex_registry.trust.rotation import rotated
from tests.registry import builders
from tests.registry.shell import Shell, failing

PROVENANCE = {
    "buildDefinition": {"buildType": "https://acme.example/train/v1"},
    "runDetails": {"builder": {"id": "https://acme.example/trainer"}},
}
CONFIG = ".config/loraplex"


@dataclass
class Here(Shell):
    """Runs the command within this process, which takes a tenth of the time."""

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        before = Path.cwd()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            for name in set(os.environ) - set(self.environment):
                patch.delenv(name)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.setattr("sys.stdin", io.StringIO())
            os.chdir(self.home)
            try:
                code = main([str(word) for word in arguments])
            except SystemExit as ending:
                code = int(ending.code or 0)
            finally:
                os.chdir(before)
        assert "Traceback" not in err.getvalue()
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with settings, an adapter directory and two versions of acme/orders, tagged prod and canary."""
    home = tmp_path_factory.mktemp("published")
    shell = Here(home, {})
    directory = builders.make_adapter(home / "orders")
    (directory / "base_model.json").write_bytes(builders.load_base(home / "base").to_json())
    shell("init", "--tenant", "acme")
    shell("push", "orders", "--tag", "prod")
    builders.make_adapter(directory, seed=1)
    shell("push", "orders", "--tag", "canary")
    (home / "provenance.json").write_text(json.dumps(PROVENANCE))
    return home


@pytest.fixture
def shell(published: Path, tmp_path: Path) -> Shell:
    """A copy of the published home; the addresses in its settings are those of the copy."""
    home = tmp_path / "home"
    shutil.copytree(published, home)
    settings = home / CONFIG / "config.toml"
    settings.write_text(settings.read_text().replace(str(published), str(home)))
    return Here(home, {})


# --- making keys


def test_a_new_key_is_encrypted_unless_told_otherwise(tmp_path: Path) -> None:
    shell = Here(tmp_path, {})
    said = failing(shell, 2, "INVALID_ARGUMENT", "keys", "gen", "a.key")
    assert "--passphrase-file" in said
    assert not (tmp_path / "a.key").exists()
    (tmp_path / "pass").write_text("correct horse\n")
    assert shell.json("keys", "gen", "a.key", "--passphrase-file", "pass")["encrypted"] is True
    assert b"ENCRYPTED" in (tmp_path / "a.key").read_bytes()
    assert "NOT encrypted" in shell("keys", "gen", "b.key", "--no-passphrase")
    failing(
        shell, 2, "INVALID_ARGUMENT", "keys", "gen", "c.key", "--no-passphrase", "--passphrase-file", "pass"
    )


def test_the_public_key_of_any_key_can_be_written(tmp_path: Path) -> None:
    shell = Here(tmp_path, {})
    made = shell.json("keys", "gen", "a.key", "--no-passphrase", "--algorithm", "ed25519")
    assert shell.json("keys", "public", "a.key", "copy.pub")["keyid"] == made["keyid"]
    assert (tmp_path / "copy.pub").read_bytes() == (tmp_path / "a.pub").read_bytes()
    failing(shell, 2, "INVALID_ARGUMENT", "keys", "public", "a.key", "copy.pub")


def test_a_signer_whose_extra_is_missing_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Here(tmp_path, {})
    # The library notes at its import whether hvac is there.
    monkeypatch.setattr("securesystemslib.signer._vault_signer.VAULT_IMPORT_ERROR", "hvac is missing")
    said = failing(shell, 2, "INVALID_ARGUMENT", "keys", "public", "hv:adapters", "vault.pub")
    assert "loraplex[vault]" in said


def test_the_list_says_where_a_key_counts_and_which_one_signs(shell: Shell) -> None:
    shell("keys", "gen", f"{CONFIG}/keys/spare.key", "--no-passphrase")
    first, second = shell.json("keys", "list")["keys"]
    assert (first["signs"], second["signs"]) == (True, False)
    assert {use["role"] for use in first["uses"]} >= {"adapters"}
    assert first["uses"][0] | {"role": ""} == {
        "scope": "acme/**",
        "role": "",
        "from": None,
        "to": None,
        "state": "counts",
    }
    assert second["uses"] == []
    assert second["private_key"].endswith("spare.key")
    assert "in no rule of the policy" in shell("keys", "list")


# --- rotating and signing again


def test_a_rotated_key_signs_everything_again_without_a_new_digest(shell: Shell) -> None:
    before = {tag: shell.json("resolve", f"orders@{tag}") for tag in ("prod", "canary")}
    blobs = {path: path.stat().st_mtime_ns for path in shell.home.rglob("b/*/*") if path.is_file()}
    turned = shell.json("keys", "rotate", "--no-passphrase", "--overlap", "30")
    assert turned["settings_changed"]
    assert turned["scopes"] == ["acme/**"]
    trusted = TrustPolicy.load(shell.home / CONFIG / "policy.toml").rules[0].keys
    assert [item.key.keyid for item in trusted] == [turned["old_keyid"], turned["keyid"]]
    assert (trusted[0].valid_to is not None, trusted[1].valid_to) == (True, None)

    planned = shell.json("resign", "--dry-run")
    assert sorted(planned["resigned"]) == [
        "acme/orders@1",
        "acme/orders@2",
        "acme/orders@canary",
        "acme/orders@prod",
    ]
    assert shell.json("resolve", "orders@prod")["keyid"] == turned["old_keyid"]
    done = shell.json("resign")
    assert (sorted(done["resigned"]), done["left"]) == (sorted(planned["resigned"]), [])

    for tag, old in before.items():
        new = shell.json("resolve", f"orders@{tag}")
        assert (new["digest"], new["keyid"]) == (old["digest"], turned["keyid"])
        assert new["tag_generation"] == old["tag_generation"] + 1
        assert shell.json("verify", f"orders@{new['digest']}")["keyid"] == turned["keyid"]
    assert blobs == {path: path.stat().st_mtime_ns for path in blobs}
    again = shell.json("resign")
    assert (again["resigned"], len(again["unchanged"])) == ([], 4)


def test_when_the_old_key_is_over_only_what_was_signed_again_counts(shell: Shell) -> None:
    time.sleep(1.1)  # what was pushed must have been issued before the key was over
    turned = shell.json("keys", "rotate", "--no-passphrase", "--overlap", "0")
    failing(shell, 6, "EXPIRED", "resolve", "orders@prod")
    left = shell.json("resign")
    assert (left["resigned"], {item["code"] for item in left["left"]}) == ([], {"EXPIRED"})
    before = dt.datetime.fromisoformat(turned["old_until"]) - dt.timedelta(seconds=1)
    done = shell.json("resign", "--as-of", f"{before:%Y-%m-%dT%H:%M:%SZ}")
    assert (len(done["resigned"]), done["left"]) == (4, [])
    assert shell.json("resolve", "orders@prod")["keyid"] == turned["keyid"]
    for wrong in ("yesterday", "2999-01-01T00:00:00Z"):
        failing(shell, 2, "INVALID_ARGUMENT", "resign", "--as-of", wrong)


def test_what_is_not_trusted_is_never_signed_again(shell: Shell) -> None:
    shell("keys", "gen", "evil.key", "--no-passphrase")
    policy = shell.home / CONFIG / "policy.toml"
    original = policy.read_text()
    policy.write_text(original.replace("keys/acme.pub", str(shell.home / "evil.pub")))
    left = shell.json("resign", "--key", "evil.key")
    assert (left["resigned"], {item["code"] for item in left["left"]}) == ([], {"SIGNATURE_INVALID"})
    policy.write_text(original)
    failing(shell, 5, "SIGNATURE_INVALID", "resign", "--key", "evil.key")
    policy.write_text(original + 'mode = "audit"\n')
    failing(shell, 6, "POLICY_REFUSED", "resign")


def test_an_older_tag_that_was_put_back_is_not_signed_again(shell: Shell) -> None:
    tag = shell.home / ".local/share/loraplex/registry/t/acme/a/orders/tags/prod.json"
    old = tag.read_bytes()
    shell("tag", "orders@2", "prod")
    shell("resolve", "orders@prod")
    tag.write_bytes(old)
    time.sleep(1.1)
    turned = shell.json("keys", "rotate", "--no-passphrase", "--overlap", "0")
    before = dt.datetime.fromisoformat(turned["old_until"]) - dt.timedelta(seconds=1)
    left = shell.json("resign", "--as-of", f"{before:%Y-%m-%dT%H:%M:%SZ}")["left"]
    assert [(item["ref"], item["code"]) for item in left] == [("acme/orders@prod", "ROLLBACK")]


def list_of(shell: Shell) -> dict[str, Any]:
    place = shell.home / ".local/share/loraplex/registry/t/acme/revocations.json"
    value: dict[str, Any] = json.loads(place.read_text())
    return value


def without_old_key(shell: Shell, turned: dict[str, Any]) -> None:
    """Take the old key out of the policy, as the last step of the drill does."""
    policy = shell.home / CONFIG / "policy.toml"
    text = re.sub(r'\{ path = "keys/acme.pub"[^}]*\}, ', "", policy.read_text())
    policy.write_text(text)
    assert turned["old_keyid"] not in {
        item.key.keyid for rule in TrustPolicy.load(policy).rules for item in (*rule.keys, *rule.revokers)
    }


def test_the_drill_of_a_rotation_ends_with_everything_accepted_under_the_new_key_alone(shell: Shell) -> None:
    bad = shell.json("resolve", "orders@2")["digest"]
    shell("revoke", "orders@2", "--reason", "wrong data", "--expires", "90d")
    turned = shell.json("keys", "rotate", "--no-passphrase")
    assert "registry resign acme" in turned["revocation_lists"][0]
    (warned,) = (
        found
        for found in shell.json("policy", "check", "--lists")["findings"]
        if "revocation list" in found["message"] and "signed by" in found["message"]
    )
    assert warned["level"] == "warning"
    planned = shell.json("resign", "--dry-run")
    assert planned["revocations"] | {"reason": ""} == {
        "tenant": "acme", "outcome": "resigned", "serial": 1, "code": None, "reason": "",
    }  # fmt: skip
    assert shell.json("revoke", "--list", "acme")["serial"] == 1
    done = shell.json("resign")
    assert (done["revocations"]["outcome"], done["revocations"]["serial"]) == ("resigned", 2)
    listed = shell.json("revoke", "--list", "acme")
    assert ([entry["digest"] for entry in listed["entries"]], listed["serial"]) == ([bad], 2)
    valid = dt.datetime.fromisoformat(listed["expires"]) - dt.datetime.fromisoformat(listed["issued"])
    assert valid == dt.timedelta(days=90)
    assert list_of(shell)["list"]["signatures"][0]["keyid"] == turned["keyid"]
    again = shell.json("resign", "--dry-run")
    assert (again["resigned"], again["revocations"]["outcome"]) == ([], "unchanged")
    failing(shell, 6, "REVOKED", "resolve", "orders@2")
    without_old_key(shell, turned)
    assert shell.json("verify", "orders@prod")["keyid"] == turned["keyid"]
    assert not any(
        "revocation list of" in found["message"]
        for found in shell.json("policy", "check", "--lists")["findings"]
    )


def test_a_list_whose_signer_left_the_policy_is_taken_over_by_the_command_that_the_refusal_names(
    shell: Shell,
) -> None:
    shell("revoke", "orders@2", "--reason", "wrong data")
    turned = shell.json("keys", "rotate", "--no-passphrase")
    done = shell.json(
        "resign", "--key", f"{CONFIG}/keys/acme.key"
    )  # the old key again: nothing changes hands
    assert done["revocations"]["outcome"] == "unchanged"
    without_old_key(shell, turned)
    findings = shell.json("policy", "check", "--lists")["findings"]
    assert [found["level"] for found in findings if "nothing of tenant acme" in found["message"]] == ["error"]
    left = shell.json("resign")["revocations"]
    assert (left["outcome"], left["code"]) == ("left", "SIGNATURE_INVALID")
    assert "registry revoke --refresh acme --signed-by OLD.pub" in left["reason"]
    failing(shell, 5, "SIGNATURE_INVALID", "revoke", "--refresh", "acme")
    other = f"{CONFIG}/keys/other.key"
    shell("keys", "gen", other, "--no-passphrase")
    failing(
        shell,
        5,
        "SIGNATURE_INVALID",
        "revoke",
        "--refresh",
        "acme",
        "--signed-by",
        f"{CONFIG}/keys/other.pub",
    )
    taken = shell.json("revoke", "--refresh", "acme", "--signed-by", f"{CONFIG}/keys/acme.pub")
    assert (taken["serial"], len(taken["entries"])) == (2, 1)
    assert shell.json("revoke", "--list", "acme")["serial"] == 2
    assert "acme/orders@1 is signed with key" in failing(shell, 5, "SIGNATURE_INVALID", "resolve", "orders@1")
    failing(shell, 2, "INVALID_ARGUMENT", "revoke", "--list", "acme", "--signed-by", "x.pub")


def test_a_list_signed_by_a_key_whose_time_is_over_is_signed_again_as_of_then(shell: Shell) -> None:
    shell("revoke", "orders@2", "--reason", "wrong data")
    time.sleep(1.1)
    turned = shell.json("keys", "rotate", "--no-passphrase", "--overlap", "0")
    assert "nothing of tenant acme is accepted" in turned["revocation_lists"][0]
    assert shell.json("resign")["revocations"]["code"] == "EXPIRED"
    before = dt.datetime.fromisoformat(turned["old_until"]) - dt.timedelta(seconds=1)
    as_of = ("--as-of", f"{before:%Y-%m-%dT%H:%M:%SZ}")
    planned = shell.json("resign", "--dry-run", *as_of)
    done = shell.json("resign", *as_of)
    assert planned["resigned"] == done["resigned"]
    assert [item["ref"] for item in planned["left"]] == [item["ref"] for item in done["left"]]
    assert done["revocations"]["serial"] == 2
    assert {item["ref"]: item["code"] for item in done["left"]} == {
        "acme/orders@2": "REVOKED",
        "acme/orders@canary": "REVOKED",
    }
    assert shell.json("resolve", "orders@prod")["keyid"] == turned["keyid"]


def test_a_key_that_is_no_revoker_leaves_the_list_to_those_who_are(shell: Shell) -> None:
    shell("revoke", "orders@2", "--reason", "wrong data")
    shell("keys", "gen", "release.key", "--no-passphrase")
    policy = shell.home / CONFIG / "policy.toml"
    policy.write_text(
        policy.read_text().replace('keys = [{ path = "keys/acme.pub" }]', 'keys = [{ path = "keys/acme.pub" }, '
        f'{{ path = "{shell.home}/release.pub" }}]')
    )  # fmt: skip
    done = shell.json("resign", "--key", "release.key")
    assert (done["revocations"]["outcome"], done["revocations"]["serial"]) == ("unchanged", 1)
    assert "acme/orders@1" in done["resigned"]


def test_a_list_is_not_signed_so_that_a_rule_which_believed_it_would_not(shell: Shell) -> None:
    shell("revoke", "orders@2", "--reason", "wrong data")
    with (shell.home / CONFIG / "policy.toml").open("a") as file:
        file.write(
            '[[rules]]\nscope = "acme/mails"\nkeys = [{ path = "keys/acme.pub" }]\n'
            "[[rules.revokers]]\n"
            'path = "keys/acme.pub"\n'
        )
    shell("keys", "gen", "next.key", "--no-passphrase")
    policy = shell.home / CONFIG / "policy.toml"
    text = policy.read_text()
    both = f'[{{ path = "keys/acme.pub" }}, {{ path = "{shell.home}/next.pub" }}]'
    policy.write_text(text.replace('[{ path = "keys/acme.pub" }]', both))
    left = shell.json("resign", "--key", "next.key")["revocations"]
    assert (left["outcome"], left["code"]) == ("left", "POLICY_REFUSED")
    assert "'acme/mails'" in left["reason"]
    assert shell.json("revoke", "--list", "acme")["serial"] == 1


def test_an_existing_key_can_be_rotated_to(shell: Shell) -> None:
    shell("keys", "gen", "next.key", "--no-passphrase")
    turned = shell.json("keys", "rotate", "--to", "next.key")
    assert turned["key"] == str(shell.home / "next.key")
    assert shell.json("push", "orders")["created"] is True  # another signer: the content is published anew
    failing(shell, 2, "INVALID_ARGUMENT", "keys", "rotate", "--to", "next.key")


def policy_text(place: Path, text: str) -> Path:
    path = place / "policy.toml"
    path.write_text('version = 1\ndefault = "deny"\n' + text)
    return path


@pytest.mark.parametrize(
    ("text", "scopes"),
    [
        ('[[rules]]\nscope = "acme/**"\nkeys = [{ path = "old.pub" }]', ("acme/**",)),
        ('[[rules]]\nscope = "acme/**"\nkeys = [ {path="./old.pub",to=2027-01-01} ]  # why', ("acme/**",)),
        (
            '# keys = [{ path = "old.pub" }]\n[[rules]]\nscope = "acme/**"\nkeys = [\n  { path = "old.pub" },\n'
            '  { path = "other.pub" },\n]\ntaggers = [{ path = "old.pub" }]\nrevokers = [{ path = "other.pub" }]\n'
            'tags = { prod = { threshold = 2, taggers = [{ path = "old.pub" }, { path = "other.pub" }] } }\n'
            'attestations = [{ type = "https://slsa.dev/provenance/v1", keys = [{ path = "old.pub" }] }]\n'
            '[[rules]]\nscope = "globex/**"\nkeys = [{ path = "other.pub" }]',
            ("acme/**",),
        ),
        (
            '[[rules]]\nscope = "acme/**"\nkeys = [{ path = "old.pub" }]\n'
            '[[rules]]\nscope = "acme/x"\nkeys = [{ path = "copy.pub", from = 2026-01-01 }]',
            ("acme/**", "acme/x"),
        ),
    ],
)
def test_every_role_of_the_old_key_passes_to_the_new_one_and_nothing_else_changes(
    text: str, scopes: tuple[str, ...], tmp_path: Path
) -> None:
    old, new, _ = (generate_key(tmp_path / f"{name}.key") for name in ("old", "new", "other"))
    shutil.copy(tmp_path / "old.pub", tmp_path / "copy.pub")
    path = policy_text(tmp_path, text)
    before = path.read_text()
    now = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC)
    until = now + dt.timedelta(days=30)
    done = rotated(path, old, new, tmp_path / "new.pub", now=now, until=until)
    assert done.scopes == scopes
    assert path.read_text() == before
    path.write_text(done.text)
    after = TrustPolicy.load(path)
    for rule in after.rules:
        for trusted in rule.keys:
            if trusted.key == old:
                assert trusted.valid_to == until
            if trusted.key == new:
                assert (trusted.valid_from, trusted.valid_to) == (now, None)
    kept = [line for line in before.splitlines() if "path" not in line or line.startswith("#")]
    assert [line for line in done.text.splitlines() if line in kept] == kept
    assert not list(tmp_path.glob(".policy*"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[[rules]]\nscope = "acme/**"\nkeys = [{ path = "other.pub" }]', "does not list"),
        ('[[rules]]\nscope = "acme/**"\n[[rules.keys]]\npath = "old.pub"', "by hand"),
        ('[[rules]]\nscope = "acme/**"\nkeys = [{ path = "old.pub" }, { path = "new.pub" }]', "already"),
    ],
)
def test_a_policy_that_cannot_be_edited_safely_is_left_alone(text: str, reason: str, tmp_path: Path) -> None:
    from loraplex_registry.errors import SettingsError

    old, new, _ = (generate_key(tmp_path / f"{name}.key") for name in ("old", "new", "other"))
    path = policy_text(tmp_path, text)
    before = path.read_bytes()
    now = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
    with pytest.raises(SettingsError, match=reason):
        rotated(path, old, new, tmp_path / "new.pub", now=now, until=now)
    assert path.read_bytes() == before


def test_a_new_key_of_a_kind_the_rule_forbids_is_refused(shell: Shell) -> None:
    before = (shell.home / CONFIG / "policy.toml").read_bytes()
    said = failing(shell, 6, "POLICY_REFUSED", "keys", "rotate", "--no-passphrase", "--algorithm", "ed25519")
    assert "algorithms" in said
    assert (shell.home / CONFIG / "policy.toml").read_bytes() == before
    assert tomllib.loads((shell.home / CONFIG / "config.toml").read_text())["key"] == "keys/acme.key"


# --- tags and what is revoked


def test_a_revoked_version_gets_no_tag_by_any_way(shell: Shell) -> None:
    shell("tag", "orders@2", "next", "--sign-only", "statement.json")
    shell("revoke", "orders@2", "--reason", "wrong data")
    said = failing(shell, 6, "REVOKED", "tag", "orders@2", "prod")
    assert "acme/orders@2" in said
    assert "revocation list of tenant acme, serial 1" in said
    for words in (
        ("tag", "orders@canary", "prod"),
        ("tag", "orders@2", "prod", "--sign-only", "other.json"),
        ("tag", "--from", "statement.json"),
        ("push", "orders", "--tag", "prod"),  # the very content of version 2
        ("push", "orders", "--tag", "canary"),
    ):
        failing(shell, 6, "REVOKED", *words)
    assert not (shell.home / "other.json").exists()
    assert shell.json("resolve", "orders@prod")["version"] == 1
    assert shell.json("push", "orders")["created"] is False
    assert shell.json("tag", "orders@1", "canary")["version"] == 1


def test_a_revoked_key_publishes_nothing_under_a_tag(shell: Shell) -> None:
    keyid = shell.json("keys", "list")["keys"][0]["keyid"]
    shell("keys", "gen", f"{CONFIG}/keys/revoker.key", "--no-passphrase")
    policy = shell.home / CONFIG / "policy.toml"
    policy.write_text(
        policy.read_text().replace(
            'revokers = [{ path = "keys/acme.pub" }]', 'revokers = [{ path = "keys/revoker.pub" }]'
        )
    )
    shell("revoke", "--keyid", keyid, "--reason", "stolen", "--key", f"{CONFIG}/keys/revoker.key")
    builders.make_adapter(shell.home / "orders", seed=8)
    assert "which signed" not in failing(shell, 6, "REVOKED", "push", "orders", "--tag", "prod")
    assert len(shell.json("ls", "acme/orders")["versions"]) == 2
    assert "which signed acme/orders@1" in failing(shell, 6, "REVOKED", "tag", "orders@1", "other")


def test_while_the_list_is_withheld_no_tag_is_moved(shell: Shell) -> None:
    shell("revoke", "orders@2", "--reason", "wrong data")
    place = shell.home / ".local/share/loraplex/registry/t/acme/revocations.json"
    place.rename(shell.home / "kept.json")
    for words in (("tag", "orders@2", "prod"), ("tag", "orders@1", "new"), ("resolve", "orders@1")):
        said = failing(shell, 6, "ROLLBACK", *words)
        assert "The revocation list of tenant acme is gone, and serial 1 was seen before" in said


# --- attestations


def test_an_attestation_is_attached_once_and_satisfies_the_policy(shell: Shell) -> None:
    digest = shell.json("resolve", "orders@prod")["digest"]
    done = shell.json("attest", "orders@prod", "provenance.json")
    assert (done["attached"], done["attestations"], done["tags"]) == (True, 1, ["prod"])
    assert shell.json("attest", "orders@prod", "provenance.json")["attached"] is False
    (shell.home / "score.json").write_text('{"score": 0.9}')
    other = shell.json("attest", "orders@1", "score.json", "--type", "https://acme.example/score/v1")
    assert (other["attached"], other["attestations"]) == (True, 2)
    policy = shell.home / CONFIG / "policy.toml"
    with policy.open("a") as file:
        file.write(
            'attestations = [{ type = "https://slsa.dev/provenance/v1", keys = [{ path = "keys/acme.pub" }], '
            'builder = "https://acme.example/trainer" }]\n'
        )
    for ref in ("orders@prod", "orders@1"):
        assert shell.json("verify", ref)["digest"] == digest
    failing(shell, 6, "POLICY_REFUSED", "verify", "orders@canary")


def test_a_demanded_attestation_can_be_attached_although_it_is_demanded(shell: Shell) -> None:
    policy = shell.home / CONFIG / "policy.toml"
    original = policy.read_text()
    policy.write_text(
        original
        + 'attestations = [{ type = "https://slsa.dev/provenance/v1", keys = [{ path = "keys/acme.pub" }] }]\n'
    )
    failing(shell, 6, "POLICY_REFUSED", "resolve", "orders@prod")
    assert shell.json("attest", "orders@prod", "provenance.json")["attached"] is True
    assert shell.json("resolve", "orders@prod")["version"] == 1
    policy.write_text(original + 'mode = "audit"\n')
    failing(shell, 6, "POLICY_REFUSED", "attest", "orders@2", "provenance.json")


def test_a_push_attaches_statements_and_a_repetition_attaches_none(shell: Shell) -> None:
    builders.make_adapter(shell.home / "orders", seed=9)
    (shell.home / "bad.json").write_text("{}")
    failing(shell, 2, "INVALID_ARGUMENT", "push", "orders", "--attest", "bad.json")
    assert len(shell.json("ls", "acme/orders")["versions"]) == 2
    for created in (True, False):
        done = shell.json("push", "orders", "--tag", "prod", "--attest", "provenance.json")
        assert (done["version"], done["created"]) == (3, created)
        again = shell.json("attest", "orders@prod", "provenance.json")
        assert (again["attached"], again["attestations"]) == (False, 1)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[]", []),
        ('{"a": 1, "a": 2}', []),
        ("{}", []),
        ("{}", ["--type", "http://acme.example/x"]),
        ('{"x": "' + "y" * 70_000 + '"}', ["--type", "https://acme.example/x"]),
    ],
)
def test_a_predicate_that_is_not_acceptable_is_refused(body: str, words: list[str], shell: Shell) -> None:
    (shell.home / "x.json").write_text(body)
    failing(shell, 2, "INVALID_ARGUMENT", "attest", "orders@prod", "x.json", *words)
    failing(shell, 2, "INVALID_ARGUMENT", "attest", "orders@prod", "absent.json")


def test_no_more_than_eight_attestations_fit(shell: Shell) -> None:
    from loraplex_registry.errors import SettingsError
    from loraplex_registry.lifecycle.amend import attach
    from loraplex_registry.refs import AdapterRef
    from loraplex_registry.registry import Registry
    from loraplex_registry.signing import load_signer
    from loraplex_registry.storage.store import open_store
    from loraplex_registry.trust.verifier import Verifier

    store = open_store((shell.home / ".local/share/loraplex/registry").as_uri())
    policy = TrustPolicy.load(shell.home / CONFIG / "policy.toml")
    verified = Verifier(Registry(store), policy).verify(AdapterRef("acme", "orders", tag="prod"))
    signer = load_signer(shell.home / CONFIG / "keys/acme.key")
    for number in range(8):
        assert attach(store, verified, "https://acme.example/n", {"n": number}, signer).changed
    with pytest.raises(SettingsError, match="another attestation"):
        attach(store, verified, "https://acme.example/n", {"n": 8}, signer)
    assert not attach(store, verified, "https://acme.example/n", {"n": 3}, signer).changed


# --- signed elsewhere


def test_the_manifest_command_says_what_to_sign_and_push(shell: Shell) -> None:
    builders.make_adapter(shell.home / "new", seed=7)
    said = shell("manifest", "new", "acme/new@3", "--base", "orders/base_model.json")
    assert "model_signing sign key new" in said
    made = shell.json("manifest", "new", "acme/new@3")
    manifest: dict[str, Any] = json.loads((shell.home / "new/adapter.manifest.json").read_text())
    assert (manifest["adapter"], manifest["version"]) == ("new", 3)
    assert made["signature"] == "new/adapter.sig.json"
    failing(shell, 4, "CONFLICT", "manifest", "new", "acme/new@4")
    failing(shell, 2, "INVALID_ARGUMENT", "manifest", "new", "acme/new")
    assert load_public_key(shell.home / CONFIG / "keys/acme.pub").algorithm == "ecdsa-p256"
