"""The IAM policies of `deploy/iam`: what every command asks of S3 and KMS is allowed to its role, and little else.

The test servers enforce no policy, so the policies are judged by a small evaluator, against the requests that real
commands send to a real S3 server.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraplex_examples.s3_server import S3Server
from loraplex_registry import cli
from loraplex_registry.encryption import kek_awskms
from tests.deploy.iam_evaluator import IAM, VALUES, Request, as_list, decide, load
from tests.registry import builders
from tests.registry.conftest import s3  # noqa: F401  (a fixture)

TENANT_ROLES = ("publisher", "tagger", "releaser", "revoker", "reader")
FLEET_ROLES = ("server", "gc", "admin")
ROLES = (*TENANT_ROLES, *FLEET_ROLES)
ROOT = "arn:aws:s3:::adapters/registry/"
CHANGED = {"s3:if-match": '"etag"'}
CREATED = {"s3:if-none-match": "*"}
NAMES = ("orders", "v", "b", "a", "t", "log", "tags", "audit", "revocations.json", "x.v")


def keys(tenant: str) -> dict[str, list[str]]:
    """Every kind of key of a tenant, with adapters and tags named to confuse a pattern."""
    adapters = [f"t/{tenant}/a/{name}" for name in NAMES]
    pid = "0" * 32
    return {
        "v": [f"{adapter}/v/{version}.json" for adapter in adapters for version in ("1", "1.0.0-rc.1")],
        "b": [f"{adapter}/b/{version}~{pid}/0" for adapter in adapters for version in ("1", "1.0.0-rc.1")],
        "tags": [f"{adapter}/tags/{tag}.json" for adapter in adapters for tag in (*NAMES, "revocations")],
        "log": [f"{adapter}/log/{tag}.json/0000000001.json" for adapter in adapters for tag in NAMES],
        "audit": [f"t/{tenant}/audit/000000000001.json"],
        "revocations": [f"t/{tenant}/revocations.json"],
        "root": ["registry.json"],
    }


PARTS = {"s3:AbortMultipartUpload": {"b"}, "s3:ListMultipartUploadParts": {"b"}}
"""What going on with an upload in parts, and removing one, takes."""

MAY: dict[str, dict[str, set[str]]] = {
    "publisher": {"s3:PutObject": {"v", "b", "audit"}, **PARTS},
    "tagger": {"s3:PutObject": {"tags", "log", "audit"}},
    "releaser": {"s3:PutObject": {"v", "b", "tags", "log", "audit"}, **PARTS},
    "revoker": {"s3:PutObject": {"revocations", "audit"}},
    "reader": {},
    "server": {},
    "gc": {"s3:PutObject": {"v"}, "s3:DeleteObject": {"b"}, **PARTS},
    "admin": {
        "s3:PutObject": {"v", "b", "tags", "log", "audit", "revocations", "root"},
        **PARTS,
    },
}
"""What each role may write or remove, by kind of key."""


def context(role: str, tenant: str = "acme", **more: str) -> dict[str, str]:
    """What AWS knows about a request of a role."""
    tag = {"aws:PrincipalTag/tenant": tenant} if role in TENANT_ROLES else {}
    arn = f"arn:aws:iam::{VALUES['account']}:role/{role}"
    return {"aws:SecureTransport": "true", "aws:PrincipalArn": arn, **tag, **more}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("action", ["s3:PutObject", "s3:DeleteObject", *PARTS])
def test_a_role_writes_its_kinds_of_keys_and_no_others(role: str, action: str) -> None:
    policies = (load(role), load("bucket-policy"))
    for kind, names in keys("acme").items():
        for name in names:
            condition = CREATED if kind in {"log", "audit"} else CHANGED
            allowed = decide(Request(action, ROOT + name, {**context(role), **condition}), *policies)
            wanted = kind in MAY[role].get(action, set())
            assert allowed == wanted, f"{role} {action} {name}"


@pytest.mark.parametrize("role", TENANT_ROLES)
def test_a_role_of_one_tenant_cannot_touch_another(role: str) -> None:
    policy = load(role)
    for tenant in ("globex", "acme2", "ac", "acme-a"):
        for kind, names in keys(tenant).items():
            for name in names if kind != "root" else []:
                for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"):
                    assert not decide(Request(action, ROOT + name, {**context(role), **CHANGED}), policy)
        listing = context(role, **{"s3:prefix": f"registry/t/{tenant}/a/"})
        assert not decide(Request("s3:ListBucket", "arn:aws:s3:::adapters", listing), policy)
    for prefix in ("", "registry/", "registry/t/", "registry/t/acm", "registry/t/acme"):
        listing = context(role, **{"s3:prefix": prefix})
        assert not decide(Request("s3:ListBucket", "arn:aws:s3:::adapters", listing), policy)
    assert not decide(
        Request("s3:GetObject", ROOT + "t/acme/revocations.json", {"aws:SecureTransport": "true"}), policy
    )


@pytest.mark.parametrize("role", ROLES)
def test_nobody_writes_a_record_unconditionally_or_without_tls(role: str) -> None:
    policies = (load(role), load("bucket-policy"))
    for kind, names in keys("acme").items():
        for name in names:
            if kind != "b":
                assert not decide(Request("s3:PutObject", ROOT + name, context(role)), *policies), name
            if kind in {"log", "audit"}:  # these are never replaced, not even by who knows the etag
                request = Request("s3:PutObject", ROOT + name, {**context(role), **CHANGED})
                assert not decide(request, *policies), name
            plain = {**context(role), **CREATED, "aws:SecureTransport": "false"}
            assert not decide(Request("s3:PutObject", ROOT + name, plain), *policies)
            assert not decide(Request("s3:GetObject", ROOT + name, plain), *policies)


def test_a_principal_with_every_role_still_cannot_remove_a_record() -> None:
    everything: dict[str, Any] = {
        "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]  # an account administrator
    }
    bucket = load("bucket-policy")
    for kind, names in keys("acme").items():
        for name in names:
            for action in ("s3:DeleteObject", "s3:DeleteObjectVersion"):
                allowed = decide(Request(action, ROOT + name, context("admin")), everything, bucket)
                assert allowed == (kind == "b"), f"{action} {name}"
                rescue = {**context("admin"), "aws:PrincipalArn": VALUES["break_glass_role_arn"]}
                assert decide(Request(action, ROOT + name, rescue), everything, bucket)


def test_kms_unwraps_for_the_callers_own_tenant_only() -> None:
    arn = VALUES["kms_key_arn"]
    key_policy = load("kms-key-policy")
    for role, action in (
        ("publisher", "kms:Encrypt"),
        ("releaser", "kms:Encrypt"),
        ("reader", "kms:Decrypt"),
    ):
        for caller in ("acme", "globex"):
            for bound in ("acme", "globex", None):
                extra = {} if bound is None else {"kms:EncryptionContext:tenant": bound}
                request = Request(action, arn, {**context(role, caller), **extra})
                assert decide(request, load(role)) == (caller == bound)
                assert decide(request, key_policy) == (caller == bound == "acme")
        other = "kms:Decrypt" if action == "kms:Encrypt" else "kms:Encrypt"
        mine = {**context(role), "kms:EncryptionContext:tenant": "acme"}
        assert not decide(Request(other, arn, mine), load(role))
    for role in ROLES:
        if role != "admin":
            assert not decide(Request("kms:ScheduleKeyDeletion", arn, context(role)), load(role))


@pytest.mark.parametrize("path", sorted(IAM.glob("*.json")), ids=lambda path: path.stem)
def test_policies_are_json_with_documented_placeholders_and_no_wildcard_actions(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    readme = (IAM / "README.md").read_text(encoding="utf-8")
    assert path.name in readme
    for placeholder in set(re.findall(r"\{\{(\w+)\}\}", text)):
        assert placeholder in VALUES
        assert "{{" + placeholder + "}}" in readme
    document = json.loads(text)
    if path.stem == "lifecycle":
        assert document["Rules"][0]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
        return
    assert document["Version"] == "2012-10-17"
    assert len(json.dumps(document, separators=(",", ":"))) < 6144  # of a managed policy, without white space
    for statement in document["Statement"]:
        if statement["Effect"] == "Allow":
            assert not any("*" in action for action in as_list(statement["Action"])), statement["Sid"]
            assert "NotResource" not in statement
            assert (
                statement["Resource"] != "*" or path.stem == "kms-key-policy"
            )  # there it means the key itself


def test_the_server_accepts_bucket_policy_and_lifecycle(s3: S3Server) -> None:  # noqa: F811
    import boto3

    s3.make_bucket("iam-documents")
    client: Any = boto3.client("s3", region_name="us-east-1")
    client.put_bucket_policy(
        Bucket="iam-documents", Policy=json.dumps(load("bucket-policy", bucket="iam-documents"))
    )
    rules = load("lifecycle")
    client.put_bucket_lifecycle_configuration(Bucket="iam-documents", LifecycleConfiguration=rules)
    assert (
        client.get_bucket_lifecycle_configuration(Bucket="iam-documents")["Rules"][0]["Status"] == "Enabled"
    )


ACTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "GetObject": lambda _: "s3:GetObject",
    "HeadObject": lambda _: "s3:GetObject",
    "PutObject": lambda _: "s3:PutObject",
    "ListObjectsV2": lambda _: "s3:ListBucket",
    "DeleteObjects": lambda _: "s3:DeleteObject",
    "CreateMultipartUpload": lambda _: "s3:PutObject",
    "UploadPart": lambda _: "s3:PutObject",
    "CompleteMultipartUpload": lambda _: "s3:PutObject",
    "AbortMultipartUpload": lambda _: "s3:AbortMultipartUpload",
    "ListParts": lambda _: "s3:ListMultipartUploadParts",
    "ListMultipartUploads": lambda _: "s3:ListBucketMultipartUploads",
    "Encrypt": lambda _: "kms:Encrypt",
    "Decrypt": lambda _: "kms:Decrypt",
    "DescribeKey": lambda _: "kms:DescribeKey",
    "ListResourceTags": lambda _: "kms:ListResourceTags",
    "ScheduleKeyDeletion": lambda _: "kms:ScheduleKeyDeletion",
}


def requests_of(operation: str, arguments: dict[str, Any], role: str) -> Iterator[Request]:
    """Return what AWS would evaluate for one call of the SDK."""
    action = ACTIONS[operation](arguments)
    known = context(role)
    if action.startswith("kms:"):
        bound = {f"kms:EncryptionContext:{k}": v for k, v in arguments.get("EncryptionContext", {}).items()}
        yield Request(action, arguments["KeyId"], {**known, **bound})
        return
    bucket = f"arn:aws:s3:::{arguments['Bucket']}"
    if action == "s3:ListBucket":
        yield Request(action, bucket, {**known, "s3:prefix": arguments.get("Prefix", "")})
        return
    if action == "s3:ListBucketMultipartUploads":  # AWS has no condition on the prefix for it
        yield Request(action, bucket, known)
        return
    if "IfNoneMatch" in arguments:
        known["s3:if-none-match"] = arguments["IfNoneMatch"]
    if "IfMatch" in arguments:
        known["s3:if-match"] = arguments["IfMatch"]
    names = (
        [entry["Key"] for entry in arguments["Delete"]["Objects"]]
        if "Delete" in arguments
        else [arguments["Key"]]
    )
    for name in names:
        yield Request(action, f"{bucket}/{name}", known)
        if action == "s3:GetObject":  # without this, S3 answers 403 and not 404 for an absent key
            yield Request("s3:ListBucket", bucket, {**context(role), "s3:prefix": name})


@dataclass
class Recorder:
    """Runs commands and keeps the SDK's calls."""

    calls: list[tuple[str, dict[str, Any]]]
    capsys: pytest.CaptureFixture[str]
    next_key: str

    def run(self, *words: str) -> dict[str, Any]:
        code = cli.main([*words, "--json"])
        out = self.capsys.readouterr().out
        assert code == 0, f"{words}: {out}"
        answer: dict[str, Any] = json.loads(out)
        return answer


@pytest.fixture
def recorder(
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Recorder:
    """A registry in a bucket of its own, configured for tenant acme with a KMS key."""
    import boto3
    import botocore.client

    kek_awskms._client.cache_clear()
    s3.make_bucket("iam-commands")
    kms: Any = boto3.client("kms", region_name="us-east-1")
    tags = [{"TagKey": "tenant", "TagValue": "acme"}]
    arn, other = (kms.create_key(Tags=tags)["KeyMetadata"]["Arn"] for _ in range(2))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    calls: list[tuple[str, dict[str, Any]]] = []
    original = botocore.client.BaseClient._make_api_call

    def spy(self: Any, operation: str, arguments: dict[str, Any]) -> Any:
        calls.append((operation, arguments))
        return original(self, operation, arguments)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", spy)
    # The fast path sends the same requests past the SDK; here all of them are to go through it.
    monkeypatch.setattr("loraplex_registry.storage.s3_client.S3Connection._new_data", lambda _: None)
    builders.make_base(tmp_path / "base")
    builders.make_adapter(tmp_path / "orders")
    made = Recorder(calls, capsys, f"awskms:{other}")
    made.run("init", "--tenant", "acme", "--registry", "s3://iam-commands/registry")
    settings = tmp_path / "config" / "loraplex" / "config.toml"
    settings.write_text(settings.read_text() + f'encryption_key = "awskms:{arn}"\n')
    return made


def test_what_commands_ask_for_is_allowed_to_their_role(recorder: Recorder, tmp_path: Path) -> None:
    base, adapter = str(tmp_path / "base"), str(tmp_path / "orders")
    steps: list[tuple[str, tuple[str, ...]]] = [
        ("admin", ("doctor", "--writers", "4", "--rounds", "1")),
        ("publisher", ("push", adapter, "acme/orders", "--base", base)),
        ("releaser", ("push", adapter, "acme/other", "--base", base, "--tag", "prod")),
        ("releaser", ("push", adapter, "acme/other", "--base", base, "--tag", "canary")),
        ("tagger", ("tag", "acme/orders@1", "prod")),
        ("tagger", ("tag", "acme/orders@1", "b")),
        ("tagger", ("untag", "acme/orders@b")),
        ("tagger", ("log", "acme/orders@b")),
        ("reader", ("ls", "acme")),
        ("reader", ("ls", "acme/orders")),
        ("reader", ("show", "acme/orders@prod")),
        ("reader", ("resolve", "acme/orders@prod")),
        ("reader", ("pull", "acme/orders@prod", str(tmp_path / "pulled"))),
        ("server", ("verify", "acme/orders@prod")),
        ("revoker", ("revoke", "acme/other@1", "--reason", "test")),
        ("gc", ("gc",)),
        ("admin", ("rm", "acme/other@1", "--force")),
        ("gc", ("gc", "--apply", "--grace", "0")),
        ("admin", ("fsck",)),
        ("admin", ("rewrap", "acme", "--to", recorder.next_key)),
        ("admin", ("shred", "acme", "--apply", "--pending-days", "7")),
    ]
    used: dict[str, set[str]] = {role: set() for role in ROLES}
    refused = []
    for role, words in steps:
        recorder.calls.clear()
        recorder.run(*words)
        for operation, arguments in recorder.calls:
            for request in requests_of(operation, arguments, role):
                used[role].add(request.action)
                values = {"bucket": "iam-commands"}
                if request.action.startswith("kms:"):
                    values["kms_key_arn"] = request.resource
                if not decide(request, load(role, **values), load("bucket-policy", **values)):
                    refused.append(f"{role} {' '.join(words[:1])}: {request.action} {request.resource}")
    assert not refused, "\n".join(sorted(set(refused)))
    # Nothing is granted that no command uses; what these small pushes do not need is named.
    seldom = {*PARTS, "kms:DescribeKey"}  # of large uploads, and of a key named by its alias
    for role in ROLES:
        granted = {
            action
            for statement in load(role)["Statement"]
            if statement["Effect"] == "Allow"
            for action in as_list(statement["Action"])
        }
        assert granted - used[role] <= seldom, f"{role}: {granted - used[role] - seldom}"
