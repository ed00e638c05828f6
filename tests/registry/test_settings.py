"""The settings file: every key known, every mistake named; what it says about S3 arrives at the bucket."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_examples.s3_server import S3Server
from loraplex_registry.configured import ConfiguredRegistry
from loraplex_registry.errors import InvalidReferenceError, SettingsError
from loraplex_registry.refs import AdapterRef
from loraplex_registry.settings import (
    Settings,
    config_directory,
    load_settings,
    settings_path,
    state_directory,
)
from loraplex_registry.signing import Signer
from loraplex_registry.storage.s3_options import (
    CHECKSUM_MODES,
    LOCK_MODES,
    OPTIONS,
    S3Options,
    environment_options,
    read_options,
)
from loraplex_registry.validation.base import BaseModel


def write(home: Path, text: str | bytes) -> dict[str, str]:
    environment = {"HOME": str(home)}
    path = settings_path(environment)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return environment


def test_without_a_file_nothing_is_set(tmp_path: Path) -> None:
    assert load_settings({"HOME": str(tmp_path)}) == Settings()


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    environment = write(tmp_path, 'key = "keys/a.key"\npolicy = "/etc/policy.toml"\nbase = "b"\n')
    found = load_settings(environment)
    place = config_directory(environment)
    assert (found.key, found.policy, found.base) == (
        str(place / "keys/a.key"),
        "/etc/policy.toml",
        str(place / "b"),
    )


def test_a_key_service_is_no_path(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, 'key = "awskms:alias/acme"\n')).key == "awskms:alias/acme"


def test_the_environment_and_the_command_line_come_later(tmp_path: Path) -> None:
    environment = write(tmp_path, 'registry = "file:///a"\n')
    assert load_settings(environment).registry == "file:///a"
    found = load_settings({**environment, "LORAPLEX_REGISTRY": "file:///b"})
    assert found.registry == "file:///b"
    assert found.overridden(registry="file:///c", region=None).registry == "file:///c"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('polici = "x"', "did you mean 'policy'"),
        ('zzz = "x"', "unknown key 'zzz'"),
        ("tenant = 3", "tenant must be a text"),
        ('key = ""', "key must be a text"),
        ("registry = ", "is not TOML"),
        (b"\xff", "is not TOML"),
        ('audit = "maybe"', 'audit must be "on" or "off"'),
        ("[registry]", "registry must be a text"),
        ("s3 = 3", r"s3 must be a section, \[s3\]"),
        (
            '[s3]\nsse_key = "x"',
            "'sse_key' is unknown; known here are checksums, timeout_s, sse, sse_kms_key_id, lock",
        ),
        ('[s3]\nsse = "rot13"', r"config.toml: \[s3\]: sse 'rot13' is unknown; use AES256 or aws:kms"),
        ('[s3]\nlock_days = "30"', "lock_days must be a whole number, not '30'"),
        ("[s3]\nlock_days = 1.5", "lock_days must be a whole number, not 1.5"),
        ("[s3]\nlock_days = true", "lock_days must be a whole number, not True"),
        ("[s3]\nlock_days = 30", "Object lock needs lock_mode and lock_days"),
        ("[s3]\ntimeout_s = nan", "timeout_s nan must be above 0"),
        ('[s3]\ntimeout_s = "3"', "timeout_s must be a number"),
        ("[s3]\nsse = []", r"sse must be a text, not \[\]"),
    ],
)
def test_a_mistake_is_named(text: str | bytes, named: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=named):
        load_settings(write(tmp_path, text))


def test_a_tenant_must_be_a_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidReferenceError):
        load_settings(write(tmp_path, 'tenant = "../x"'))


def test_what_is_missing_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--registry"):
        Settings().require("registry", option="--registry")


def test_directories_follow_the_xdg_specification(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert config_directory({**home, "XDG_CONFIG_HOME": "relative"}) == tmp_path / ".config/loraplex"
    assert config_directory({**home, "XDG_CONFIG_HOME": "/x"}) == Path("/x/loraplex")
    assert state_directory(home) == tmp_path / ".local/state/loraplex"


# What S3 is told


def _tables() -> st.SearchStrategy[dict[str, Any]]:
    """Sections that are right."""
    lock = st.fixed_dictionaries(
        {"lock_mode": st.sampled_from(LOCK_MODES), "lock_days": st.integers(1, 36_500)}
    )
    sse = st.sampled_from(
        [{}, {"sse": "AES256"}, {"sse": "aws:kms"}, {"sse": "aws:kms", "sse_kms_key_id": "k"}]
    )
    rest = st.fixed_dictionaries(
        {},
        optional={
            "checksums": st.sampled_from(CHECKSUM_MODES),
            "timeout_s": st.floats(0.001, 600) | st.integers(1, 600),
        },
    )
    return st.tuples(st.just({}) | lock, sse, rest).map(lambda parts: {**parts[0], **parts[1], **parts[2]})


@given(table=_tables())
def test_file_and_environment_say_the_same(table: dict[str, Any]) -> None:
    from_file = read_options(table, where="here")
    variables = {f"LORAPLEX_S3_{name.upper()}": str(value) for name, value in table.items()}
    assert read_options(environment_options(variables), where="here") == from_file
    assert {name: getattr(from_file, name) for name in table} == table
    default = S3Options()
    assert all(getattr(from_file, name) == getattr(default, name) for name in OPTIONS if name not in table)


def test_a_variable_comes_before_the_file_and_must_be_known(tmp_path: Path) -> None:
    environment = write(tmp_path, '[s3]\nsse = "AES256"\ntimeout_s = 9\n')
    assert load_settings(environment).s3 == S3Options(sse="AES256", timeout_s=9)
    found = load_settings({**environment, "LORAPLEX_S3_SSE": "aws:kms", "LORAPLEX_S3_TIMEOUT_S": ""})
    assert found.s3 == S3Options(sse="aws:kms", timeout_s=9)
    with pytest.raises(SettingsError, match="LORAPLEX_S3_SEE is unknown; known are LORAPLEX_S3_CHECKSUMS, "):
        load_settings({"HOME": str(tmp_path), "LORAPLEX_S3_SEE": "AES256"})
    with pytest.raises(SettingsError, match="LORAPLEX_S3_LOCK_DAYS must be a number, not 'many'"):
        load_settings({"HOME": str(tmp_path), "LORAPLEX_S3_LOCK_DAYS": "many"})
    with pytest.raises(SettingsError, match=r"config.toml: \[s3\] and the environment: Object lock needs"):
        load_settings({**environment, "LORAPLEX_S3_LOCK_DAYS": "3"})


def test_what_is_set_arrives_at_the_bucket(
    s3: S3Server, tmp_path: Path, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    client = boto3.client("s3", endpoint_url=s3.endpoint_url)
    client.create_bucket(Bucket="locked-by-settings", ObjectLockEnabledForBucket=True)
    text = 'registry = "s3://locked-by-settings/r"\n'
    text += f"endpoint_url = {json.dumps(s3.endpoint_url)}\n"
    text += '[s3]\nsse = "aws:kms"\nsse_kms_key_id = "key-1"\nlock_mode = "GOVERNANCE"\nlock_days = 2\n'
    place = ConfiguredRegistry(
        settings=load_settings(write(tmp_path, text)), environment={"HOME": str(tmp_path)}
    )
    place.registry().initialise()
    place.publish(adapter, AdapterRef("acme", "orders"), [signer], base, tag="prod")
    stored = client.list_object_versions(Bucket="locked-by-settings")["Versions"]
    assert len({item["Key"] for item in stored}) > 4
    for item in stored:
        head = client.head_object(Bucket="locked-by-settings", Key=item["Key"], VersionId=item["VersionId"])
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "key-1"), item["Key"]
        left = head["ObjectLockRetainUntilDate"] - dt.datetime.now(dt.UTC)
        assert head["ObjectLockMode"] == "GOVERNANCE"
        assert dt.timedelta(days=1.9) < left < dt.timedelta(days=2.1)
