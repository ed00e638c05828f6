"""Vectors that must be refused because of the objects: who holds the bucket, and no key, made them."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loraplex_registry.format.canonical import b64decode, b64encode, canonical
from loraplex_registry.format.manifest import FileEntry
from tests.registry.forge import Forge, Objects, edited, policy_text, repacked, signer, statement, tag
from tests.vectors.generate import Step, case

ONE = "acme/orders@1"
RECORD = "t/acme/a/orders/v/1.json"
TAG = "t/acme/a/orders/tags/prod.json"
IN_TOTO = "application/vnd.in-toto+json"
Change = Callable[[dict[str, Any]], object]


def _envelope(value: dict[str, Any]) -> dict[str, Any]:
    return value["bundle"]["dsseEnvelope"]


def _resigned(change: Change) -> Change:
    """Change the Model Signing statement and sign it again with the listed key: only its form is wrong."""

    def apply(value: dict[str, Any]) -> None:
        envelope = _envelope(value)
        signed = json.loads(b64decode(envelope["payload"]))
        change(signed)
        value["bundle"]["dsseEnvelope"] = repacked(envelope, canonical(signed), "ci")

    return apply


def serialization(**fields: object) -> Change:
    return _resigned(lambda signed: signed["predicate"]["serialization"].update(fields))


def _resources(signed: dict[str, Any]) -> list[dict[str, Any]]:
    return signed["predicate"]["resources"]


def _reroot(signed: dict[str, Any]) -> None:
    """The subject's digest follows from the resources."""
    digests = b"".join(bytes.fromhex(item["digest"]) for item in _resources(signed))
    signed["subject"][0]["digest"]["sha256"] = hashlib.sha256(digests).hexdigest()


def _with_resource(signed: dict[str, Any], name: str, digest: str) -> None:
    _resources(signed).append({"name": name, "algorithm": "sha256", "digest": digest})
    _resources(signed).sort(key=lambda item: item["name"])
    _reroot(signed)


def _without_resource(signed: dict[str, Any], name: str) -> None:
    signed["predicate"]["resources"] = [item for item in _resources(signed) if item["name"] != name]
    _reroot(signed)


def _flip(text: str) -> str:
    body = bytearray(b64decode(text))
    body[len(body) // 2] ^= 1
    return b64encode(bytes(body))


def _flip_signature(value: dict[str, Any]) -> None:
    signature = _envelope(value)["signatures"][0]
    signature["sig"] = _flip(signature["sig"])


def _flip_payload(value: dict[str, Any]) -> None:
    signed = json.loads(b64decode(_envelope(value)["payload"]))
    _resources(signed)[0]["digest"] = "0" * 64
    _reroot(signed)
    _envelope(value)["payload"] = b64encode(canonical(signed))


def _claims_listed_key(value: dict[str, Any]) -> None:
    """Signed by a stranger, under the id of the listed key."""
    envelope = _envelope(value)
    made = repacked(envelope, b64decode(envelope["payload"]), "stranger")
    made["signatures"][0]["keyid"] = signer("ci").keyid
    value["bundle"]["dsseEnvelope"] = made


def _two_signatures(value: dict[str, Any]) -> None:
    envelope = _envelope(value)
    value["bundle"]["dsseEnvelope"] = repacked(envelope, b64decode(envelope["payload"]), "ci", "stranger")


def _as_another_type(value: dict[str, Any]) -> None:
    envelope = _envelope(value)
    payload = b64decode(envelope["payload"])
    value["bundle"]["dsseEnvelope"] = repacked(envelope, payload, "ci", payload_type="application/json")


def _duplicate_key(value: dict[str, Any]) -> None:
    envelope = _envelope(value)
    payload = b64decode(envelope["payload"]).replace(b'{"_type"', b'{"_type":"x","_type"', 1)
    value["bundle"]["dsseEnvelope"] = repacked(envelope, payload, "ci")


def _manifest_with(**fields: object) -> Change:
    """Change the manifest and leave its signature as it was."""

    def apply(value: dict[str, Any]) -> None:
        manifest = json.loads(b64decode(value["manifest"]))
        manifest.update(fields)
        value["manifest"] = b64encode(canonical(manifest))

    return apply


def _file(value: dict[str, Any], name: str) -> dict[str, Any]:
    return next(file for file in value["storage"]["files"] if file["name"] == name)


def _inline_with(old: bytes, new: bytes) -> Change:
    """Change the stored configuration, its digest with it."""

    def apply(value: dict[str, Any]) -> None:
        file = _file(value, "adapter_config.json")
        body = b64decode(file["inline"]).replace(old, new)
        file.update(inline=b64encode(body), size=len(body), sha256=hashlib.sha256(body).hexdigest())

    return apply


def _extra_stored_file(value: dict[str, Any]) -> None:
    body = b"pickled"
    value["storage"]["files"].append(
        {
            "name": "adapter_model.bin",
            "size": 7,
            "sha256": hashlib.sha256(body).hexdigest(),
            "inline": b64encode(body),
        }
    )


def _records() -> None:
    """One change to a good record each."""
    sign, mismatch = "SIGNATURE_INVALID", "DIGEST_MISMATCH"
    table: dict[str, tuple[str, Change, str]] = {
        "signature_changed": ("One bit of the signature.", _flip_signature, sign),
        "signature_over_other_bytes": ("The statement was changed after it was signed.", _flip_payload, sign),
        "signature_removed": ("No signature at all.", lambda v: _envelope(v).update(signatures=[]), sign),
        "signature_empty": (
            "An empty signature.",
            lambda v: _envelope(v)["signatures"][0].update(sig=""),
            sign,
        ),
        "signature_under_a_listed_id": (
            "A stranger signed and wrote the listed key's id.",
            _claims_listed_key,
            sign,
        ),
        "signature_twice": ("A bundle has exactly one signature.", _two_signatures, sign),
        "signature_of_another_type": ("Signed as another payload type.", _as_another_type, sign),
        "bundle_missing": ("No bundle.", lambda v: v["bundle"].clear(), sign),
        "bundle_of_another_version": (
            "A media type of another bundle version.",
            lambda v: v["bundle"].update(mediaType="application/vnd.dev.sigstore.bundle+json;version=0.1"),
            sign,
        ),
        "bundle_without_key_hint": (
            "The key hint is missing; some verifiers only warn.",
            lambda v: v["bundle"]["verificationMaterial"].update(publicKey={}),
            sign,
        ),
        "bundle_hint_of_another_key": (
            "Bundle and envelope name two keys.",
            lambda v: v["bundle"]["verificationMaterial"]["publicKey"].update(hint=signer("ci2").keyid),
            sign,
        ),
        "bundle_with_unknown_key": ("A key nobody knows.", lambda v: v["bundle"].update(extra=1), sign),
        "statement_before_1_0": (
            "A predicate of before version 1.0, which some verifiers still take.",
            _resigned(lambda s: s.update(predicateType="https://model_signing/Digests/v0.1")),
            sign,
        ),
        "statement_method_shards": (
            "The method shards leaves out empty files.",
            serialization(method="shards"),
            sign,
        ),
        "statement_allows_symlinks": (
            "The signature may not allow links.",
            serialization(allow_symlinks=True),
            sign,
        ),
        "statement_ignores_paths": (
            "The signature may not leave out a file that is loaded.",
            serialization(ignore_paths=["adapter_model.bin"]),
            sign,
        ),
        "statement_other_hash": ("Another hash than SHA-256.", serialization(hash_type="blake2b"), sign),
        "statement_duplicate_key": (
            "A key twice: two readers would see two statements.",
            _duplicate_key,
            sign,
        ),
        "statement_inconsistent_root": (
            "The subject's digest does not follow from the files.",
            _resigned(lambda s: s["subject"][0]["digest"].update(sha256="0" * 64)),
            sign,
        ),
        "statement_without_manifest": (
            "The manifest is not among the signed files: nothing binds the tenant.",
            _resigned(lambda s: _without_resource(s, "adapter.manifest.json")),
            mismatch,
        ),
        "statement_without_weights": (
            "The weights are not among the signed files.",
            _resigned(lambda s: _without_resource(s, "adapter_model.safetensors")),
            sign,
        ),
        "statement_with_unlisted_file": (
            "A signed file that the manifest does not list.",
            _resigned(lambda s: _with_resource(s, "adapter_model.bin", "0" * 64)),
            sign,
        ),
        "statement_resource_twice": (
            "A file named twice.",
            _resigned(lambda s: (_resources(s).append(_resources(s)[0]), _reroot(s))),
            sign,
        ),
        "manifest_changed": (
            "Another rank than was signed.",
            _manifest_with(created="2026-06-01T12:00:01Z"),
            mismatch,
        ),
        "manifest_of_another_tenant": ("The tenant was changed.", _manifest_with(tenant="globex"), mismatch),
        "manifest_not_base64": ("Not base64.", lambda v: v.update(manifest="*"), mismatch),
        "config_changed": (
            "Another rank in the stored configuration, with its digest.",
            _inline_with(b'"r": 2', b'"r": 4'),
            mismatch,
        ),
        "config_changed_digest_kept": (
            "Another configuration under the old digest.",
            lambda v: _file(v, "adapter_config.json").update(
                inline=_flip(_file(v, "adapter_config.json")["inline"])
            ),
            mismatch,
        ),
        "record_stores_another_file": (
            "An unsigned adapter_model.bin beside the signed files.",
            _extra_stored_file,
            mismatch,
        ),
        "record_without_a_file": (
            "A signed file is not stored.",
            lambda v: v["storage"]["files"].pop(0),
            mismatch,
        ),
        "record_files_in_another_order": (
            "Stored in another order.",
            lambda v: v["storage"]["files"].reverse(),
            mismatch,
        ),
        "record_size_changed": (
            "Another size than was signed.",
            lambda v: _file(v, "adapter_model.safetensors").update(size=1),
            mismatch,
        ),
        "record_blob_of_another_push": (
            "A blob of another push.",
            lambda v: _file(v, "adapter_model.safetensors").update(key="b/1~" + "f" * 32 + "/0"),
            mismatch,
        ),
        "record_blob_outside": (
            "A blob key that leaves the adapter.",
            lambda v: _file(v, "adapter_model.safetensors").update(
                key="../../../globex/a/orders/b/1~" + "0" * 32 + "/0"
            ),
            mismatch,
        ),
        "record_push_id_changed": ("Another push id.", lambda v: v.update(pid="0" * 32), mismatch),
        "record_later_format": ("A later format.", lambda v: v.update(fmt=2), mismatch),
        "record_format_true": ("true is not 1.", lambda v: v.update(fmt=True), mismatch),
        "record_with_unknown_key": ("A key nobody knows.", lambda v: v.update(extra=1), mismatch),
        "record_state_unknown": ("A state nobody knows.", lambda v: v.update(state="approved"), mismatch),
        "record_attestation_no_object": (
            "An attestation that is no object.",
            lambda v: v.update(attest=[1]),
            mismatch,
        ),
    }
    for name, (why, change, expect) in table.items():

        def make(f: Forge, change: Change = change, expect: str = expect) -> Step:
            objects = f.objects(f.record())
            objects[RECORD] = edited(objects[RECORD], change)
            return Step(objects, expect, ONE)

        case(f"{name}_fail", why)(make)


_records()


def _bytes() -> None:
    """Changes to the bytes of an object."""
    table: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
        "record_not_canonical": (
            "The same value in another spelling.",
            lambda body: body.replace(b'"fmt":1', b'"fmt": 1'),
            "record",
        ),
        "record_key_twice": (
            "A key twice.",
            lambda body: body.replace(b'"fmt":1', b'"fmt":1,"fmt":1', 1),
            "record",
        ),
        "record_truncated": ("Half a record.", lambda body: body[: len(body) // 2], "record"),
        "record_empty": ("An empty record.", lambda body: b"", "record"),
        "record_too_deep": ("A thousand nested lists.", lambda body: b"[" * 1000 + b"]" * 1000, "record"),
        "record_not_utf8": ("Bytes that are no text.", lambda body: b"\xff" + body, "record"),
        "blob_changed": ("One bit of the weights.", lambda body: body[:-1] + bytes([body[-1] ^ 1]), "blob"),
        "blob_truncated": ("Weights cut short.", lambda body: body[:-1], "blob"),
        "blob_extended": ("Weights with something behind.", lambda body: body + b"PK\x03\x04", "blob"),
        "blob_empty": ("No weights.", lambda body: b"", "blob"),
    }
    for name, (why, change, which) in table.items():

        def make(f: Forge, change: Callable[[bytes], bytes] = change, which: str = which) -> Step:
            objects = f.objects(f.record())
            key = RECORD if which == "record" else next(key for key in objects if "/b/" in key)
            objects[key] = change(objects[key])
            return Step(objects, "DIGEST_MISMATCH", ONE)

        case(f"{name}_fail", why)(make)


_bytes()


@case("blob_missing_fail", "The weights are gone.")
def blob_missing(f: Forge) -> Step:
    objects = f.objects(f.record())
    return Step({key: body for key, body in objects.items() if "/b/" not in key}, "DIGEST_MISMATCH", ONE)


@case("mix_and_match_fail", "The record of version 1 with the weights of version 2, both genuine.")
def mix_and_match(f: Forge) -> Step:
    objects = f.objects(f.record())
    key = next(key for key in objects if "/b/" in key)
    return Step({**objects, key: f.body("adapter_model.safetensors", 1)}, "DIGEST_MISMATCH", ONE)


@case(
    "mixed_record_fail",
    "The manifest and bundle of version 1 with the storage of another push of the same name.",
)
def mixed_record(f: Forge) -> Step:
    first, second = f.record(), f.record(seed=1)
    mixed = replace(first, pid=second.pid, files=second.files)
    return Step(f.objects(mixed, seed=1), "DIGEST_MISMATCH", ONE)


def _transplants() -> None:
    """A genuine version under another name: the name is bound by the signature."""
    both = policy_text() + policy_text(scope="globex/**", keys=("ci", "globex"), head=False)
    table = {
        "transplant_to_tenant": ("A version of acme copied under globex.", "globex/orders@1", 1),
        "transplant_to_adapter": ("A version of acme/orders copied under acme/billing.", "acme/billing@1", 1),
        "transplant_to_version": ("Version 1 copied under the number 2.", "acme/orders@2", 2),
        "transplant_to_semantic_version": ("Version 1 copied under 1.0.0.", "acme/orders@1.0.0", "1.0.0"),
    }
    for name, (why, ref, version) in table.items():

        def make(f: Forge, ref: str = ref, version: Any = version) -> Step:
            record = f.record()
            files = tuple(
                file if file.blob is None else replace(file, blob=file.blob.replace("b/1~", f"b/{version}~"))
                for file in record.files
            )
            moved = replace(record, files=files)
            return Step(
                f.objects(moved, under=ref.partition("@")[0], version=version), "SIGNATURE_INVALID", ref, both
            )

        case(f"{name}_fail", why)(make)


_transplants()


@case(
    "another_tenants_signature_fail", "globex signed an adapter of acme with its own, elsewhere listed key."
)
def another_tenants_signature(f: Forge) -> Step:
    policy = policy_text() + policy_text(scope="globex/**", keys=("globex",), head=False)
    return Step(f.objects(f.record(key="globex")), "SIGNATURE_INVALID", ONE, policy)


@case("transplant_in_audit_mode_fail", "Audit mode does not waive whose adapter it is.")
def transplant_in_audit_mode(f: Forge) -> Step:
    policy = policy_text('mode = "audit"', scope="globex/**")
    return Step(f.objects(f.record(), under="globex/orders"), "SIGNATURE_INVALID", "globex/orders@1", policy)


@case("blob_changed_in_audit_mode_fail", "Audit mode does not waive the signed bytes.")
def blob_in_audit_mode(f: Forge) -> Step:
    objects = f.objects(f.record())
    key = next(key for key in objects if "/b/" in key)
    return Step(
        {**objects, key: objects[key][:-1] + b"\x55"}, "DIGEST_MISMATCH", ONE, policy_text('mode = "audit"')
    )


@case("manifest_without_weights_fail", "A signed manifest that lists no weights.")
def manifest_without_weights(f: Forge) -> Step:
    manifest = f.manifest()
    files = tuple(file for file in manifest.files if file.name != "adapter_model.safetensors")
    return Step(f.objects(f.record(manifest=replace(manifest, files=files))), "SIGNATURE_INVALID", ONE)


@case("manifest_lists_itself_fail", "A signed manifest that lists adapter.manifest.json among its files.")
def manifest_lists_itself(f: Forge) -> Step:
    manifest = f.manifest()
    own = FileEntry("adapter.manifest.json", 1, "0" * 64)
    files = tuple(sorted((*manifest.files, own), key=lambda file: file.name))
    record = f.record()
    value = edited(
        record.to_bytes(), lambda v: v.update(manifest=b64encode(replace(manifest, files=files).to_bytes()))
    )
    return Step({**f.objects(record), RECORD: value}, "DIGEST_MISMATCH", ONE)


def _states() -> None:
    """States in which a version is not there."""
    pid, key = "0" * 32, signer("ci").keyid
    table = {
        "pending": {"fmt": 1, "state": "pending", "pid": pid, "by": key, "t": 1, "lease_s": 3600},
        "aborted": {"fmt": 1, "state": "aborted", "pid": pid, "reason": "lease over"},
        "deleted": {
            "fmt": 1,
            "state": "deleted",
            "pid": pid,
            "manifest_sha256": "0" * 64,
            "t": 1,
            "reason": "rm",
        },
    }
    for name, value in table.items():

        def make(f: Forge, value: dict[str, Any] = value) -> Step:
            return Step({RECORD: canonical(copy.deepcopy(value))}, "ADAPTER_NOT_FOUND", ONE)

        case(f"record_{name}_fail", f"A version that is {name} is not there.")(make)


_states()


@case("nothing_there_fail", "An empty registry.")
def nothing_there(f: Forge) -> Step:
    return Step({}, "ADAPTER_NOT_FOUND", ONE)


@case("digest_not_there_fail", "The digest asked for is of another version than the registry has.")
def digest_not_there(f: Forge) -> Step:
    return Step(f.objects(f.record()), "ADAPTER_NOT_FOUND", f"acme/orders@{f.record(2, seed=1).digest}")


def _tag_objects() -> None:
    """Genuine signatures in the place of a tag's, and tags in another place."""

    def as_tag(envelope: Callable[[Forge, Any], dict[str, Any]]) -> Callable[[Forge], Objects]:
        def make(f: Forge) -> Objects:
            record = f.record()
            (body,) = tag(record).values()
            return {TAG: edited(body, lambda value: value.update(tag=envelope(f, record)))}

        return make

    def retyped(f: Forge, record: Any) -> dict[str, Any]:
        return repacked({"payloadType": IN_TOTO}, statement(record).to_bytes(), "ci")

    table: dict[str, tuple[str, Callable[[Forge], Objects], str]] = {
        "tag_is_an_adapter_signature": (
            "The signature of the adapter in the place of the tag's.",
            as_tag(lambda f, record: record.bundle["dsseEnvelope"]),
            "DIGEST_MISMATCH",
        ),
        "tag_signed_as_another_type": (
            "A tag statement signed as an in-toto statement.",
            as_tag(retyped),
            "SIGNATURE_INVALID",
        ),
        "tag_of_another_tag": (
            "canary's statement under prod.",
            lambda f: tag(f.record(), name="acme/orders@canary", under="acme/orders@prod"),
            "SIGNATURE_INVALID",
        ),
        "tag_of_another_adapter": (
            "The tag of acme/billing under acme/orders.",
            lambda f: tag(f.record(), name="acme/billing@prod", under="acme/orders@prod"),
            "SIGNATURE_INVALID",
        ),
        "tag_of_another_tenant": (
            "The tag of globex/orders under acme/orders.",
            lambda f: tag(f.record(), name="globex/orders@prod", under="acme/orders@prod"),
            "SIGNATURE_INVALID",
        ),
        "tag_carries_another_record": (
            "The statement is about version 1, the copy of the record is another push of it.",
            lambda f: tag(f.record(), carries=f.record(seed=1)),
            "SIGNATURE_INVALID",
        ),
        "tag_without_signature": (
            "No signature.",
            lambda f: {TAG: edited(*tag(f.record()).values(), lambda v: v["tag"].update(signatures=[]))},
            "SIGNATURE_INVALID",
        ),
        "tag_not_canonical": (
            "The same tag in another spelling.",
            lambda f: {TAG: next(iter(tag(f.record()).values())) + b"\n"},
            "DIGEST_MISMATCH",
        ),
        "tag_removed": ("The tag was removed.", lambda f: tag(None, 2), "ADAPTER_NOT_FOUND"),
        "tag_generation_zero": (
            "Generations begin at 1.",
            lambda f: {TAG: edited(*tag(f.record()).values(), _generation_zero)},
            "DIGEST_MISMATCH",
        ),
    }
    for name, (why, make_tag, expect) in table.items():

        def make(f: Forge, make_tag: Callable[[Forge], Objects] = make_tag, expect: str = expect) -> Step:
            return Step({**f.objects(f.record()), **make_tag(f)}, expect)

        case(f"{name}_fail", why)(make)


def _generation_zero(value: dict[str, Any]) -> None:
    payload = json.loads(b64decode(value["tag"]["payload"]))
    payload["generation"] = 0
    value["tag"] = repacked(value["tag"], canonical(payload), "ci")


_tag_objects()


@case("bundle_is_a_tag_statement_fail", "The tag's signature in the place of the adapter's.")
def bundle_is_a_tag(f: Forge) -> Step:
    record = f.record()
    (body,) = tag(record).values()
    envelope = json.loads(body)["tag"]
    objects = f.objects(record)
    objects[RECORD] = edited(objects[RECORD], lambda value: value["bundle"].update(dsseEnvelope=envelope))
    return Step(objects, "SIGNATURE_INVALID", ONE)
