"""Vectors that must be accepted."""

import json

from loraplex_registry.format.canonical import canonical
from loraplex_registry.trust.revocations import Revocation
from tests.registry.forge import Forge, edited, key_list, policy_text, revocations, signer, tag
from tests.vectors.failing_objects import serialization
from tests.vectors.generate import Step, case

SLSA = "https://slsa.dev/provenance/v1"
SEPARATE = f"taggers = {key_list('release')}"
THRESHOLD = (
    f"tags = {{ prod = {{ threshold = 2, taggers = {key_list('release', 'release2', 'release3')} }} }}"
)
REVOKERS = f"revokers = {key_list('security')}"
LIST_DEMANDED = REVOKERS + '\nrevocation = { max_age = "36500d" }'
NEVER_FRESH = REVOKERS + '\nrevocation = { max_age = "1h" }'


@case("version", "A version asked for by its number, signed by the one listed key.")
def version(f: Forge) -> Step:
    return Step(f.objects(f.record()), "OK", "acme/orders@1")


@case("newest", "Without a selector the newest committed version is meant.")
def newest(f: Forge) -> Step:
    return Step({**f.objects(f.record(1)), **f.objects(f.record(2, seed=1), seed=1)}, "OK", "acme/orders")


@case("digest", "A version asked for by the digest of its manifest.")
def digest(f: Forge) -> Step:
    record = f.record()
    return Step(f.objects(record), "OK", f"acme/orders@{record.digest}")


@case("semantic_version", "Versions may be semantic versions.")
def semantic_version(f: Forge) -> Step:
    return Step(f.objects(f.record("1.2.0-rc.1")), "OK", "acme/orders@1.2.0-rc.1")


@case("tag_by_default_taggers", "Without taggers in the rule, its keys sign tags too.")
def tag_by_default_taggers(f: Forge) -> Step:
    record = f.record()
    return Step({**f.objects(record), **tag(record)}, "OK")


@case("tag_by_own_tagger", "A tag signed by the release key, the adapter by the build's key.")
def tag_by_own_tagger(f: Forge) -> Step:
    record = f.record()
    return Step({**f.objects(record), **tag(record, keys=("release",))}, "OK", policy=policy_text(SEPARATE))


@case("tag_threshold", "Two of three release keys signed.")
def tag_threshold(f: Forge) -> Step:
    record = f.record()
    return Step(
        {**f.objects(record), **tag(record, keys=("release", "release3"))},
        "OK",
        policy=policy_text(THRESHOLD),
    )


@case("tag_threshold_with_stranger", "A third signature by a key nobody listed is not looked at.")
def tag_threshold_with_stranger(f: Forge) -> Step:
    record = f.record()
    signed = tag(record, keys=("release", "release2", "stranger"))
    return Step({**f.objects(record), **signed}, "OK", policy=policy_text(THRESHOLD))


@case("tag_not_expired", "A tag that expires in the far future.")
def tag_not_expired(f: Forge) -> Step:
    record = f.record()
    return Step({**f.objects(record), **tag(record, expires="9999-01-01T00:00:00Z")}, "OK")


@case("tag_seen_twice", "The same generation with the same content is no rollback.")
def tag_seen_twice(f: Forge) -> list[Step]:
    record = f.record()
    objects = {**f.objects(record), **tag(record, 7)}
    return [Step(objects, "OK"), Step(objects, "OK")]


@case(
    "tag_moved_back_by_new_generation",
    "An honest rollback is a new generation that points to an old version.",
)
def tag_moved_back(f: Forge) -> list[Step]:
    first, second = f.record(1), f.record(2, seed=1)
    both = {**f.objects(first), **f.objects(second, seed=1)}
    moves = [tag(first, 1), tag(second, 2), tag(first, 3)]
    return [Step({**both, **move}, "OK") for move in moves]


@case("tag_set_again_after_removal", "A removed tag comes back with the next generation.")
def tag_set_again(f: Forge) -> list[Step]:
    record = f.record()
    objects = f.objects(record)
    return [
        Step({**objects, **tag(record, 1)}, "OK"),
        Step({**objects, **tag(None, 2)}, "ADAPTER_NOT_FOUND"),
        Step({**objects, **tag(record, 3)}, "OK"),
    ]


@case(
    "fast_forward_recovered",
    "A stolen tag key jumped to a huge generation. Once it is out of the policy its mark counts no more, so the "
    "successor key's small generation is accepted.",
)
def fast_forward_recovered(f: Forge) -> list[Step]:
    record = f.record()
    objects = f.objects(record)
    rotated = f"taggers = {key_list('release2')}"
    return [
        Step({**objects, **tag(record, 999_999_999, keys=("release",))}, "OK", policy=policy_text(SEPARATE)),
        Step({**objects, **tag(record, 4, keys=("release2",))}, "OK", policy=policy_text(rotated)),
    ]


@case("key_rotated", "The old key still counts until its date, the new one from its own: both sign.")
def key_rotated(f: Forge) -> list[Step]:
    policy = policy_text(keys=("ci from 2020-01-01 to 9000-01-01", "ci2 from 2026-01-01"))
    return [
        Step(f.objects(f.record(key="ci")), "OK", "acme/orders@1", policy),
        Step(f.objects(f.record(2, key="ci2", seed=1), seed=1), "OK", "acme/orders@2", policy),
    ]


@case("p256_by_default", "Without algorithms in the rule an ECDSA P-256 key signs adapters.")
def p256_by_default(f: Forge) -> Step:
    policy = 'version = 1\ndefault = "deny"\n[[rules]]\nscope = "acme/**"\nkeys = [{ path = "keys/p256-ci.pub" }]\n'
    return Step(f.objects(f.record(key="p256-ci")), "OK", "acme/orders@1", policy)


@case("longest_scope_decides", "The rule of acme/orders decides; the one of acme/** would refuse.")
def longest_scope(f: Forge) -> Step:
    policy = policy_text(keys=("stranger",)) + policy_text(scope="acme/orders", head=False)
    return Step(f.objects(f.record()), "OK", "acme/orders@1", policy)


@case("limits_met_exactly", "Rank, bytes, base and version are exactly what the rule allows.")
def limits_met(f: Forge) -> Step:
    manifest = f.manifest(3)
    limits = (
        f"limits = {{ max_rank = {manifest.lora.rank}, max_bytes = {manifest.size_bytes}, min_version = 3, "
        f'bases = ["{manifest.base_model.digest}"] }}'
    )
    return Step(f.objects(f.record(3)), "OK", "acme/orders@3", policy_text(limits))


@case("revocation_list_empty", "The rule demands a list; there is one and nothing is on it.")
def revocation_list_empty(f: Forge) -> Step:
    return Step({**f.objects(f.record()), **revocations()}, "OK", "acme/orders@1", policy_text(LIST_DEMANDED))


@case("revocation_of_others", "Another version and another key were revoked.")
def revocation_of_others(f: Forge) -> Step:
    listed = revocations(
        Revocation("leaked data", digest=f.record(2, seed=1).digest),
        Revocation("stolen", keyid=signer("ci2").keyid),
    )
    return Step({**f.objects(f.record()), **listed}, "OK", "acme/orders@1", policy_text(LIST_DEMANDED))


@case(
    "revoked_key_since_later", "The key was revoked for what it signed from 2026-07-01 on; this is from June."
)
def revoked_since_later(f: Forge) -> Step:
    listed = revocations(Revocation("laptop lost", keyid=signer("ci").keyid, since="2026-07-01T00:00:00Z"))
    return Step({**f.objects(f.record()), **listed}, "OK", "acme/orders@1", policy_text(LIST_DEMANDED))


@case("revocation_list_grows", "A newer list with a higher serial follows one that was seen.")
def revocation_list_grows(f: Forge) -> list[Step]:
    objects, policy = f.objects(f.record()), policy_text(LIST_DEMANDED)
    entry = Revocation("leaked data", digest=f.record(2, seed=1).digest)
    return [
        Step({**objects, **revocations(serial=1)}, "OK", "acme/orders@1", policy),
        Step({**objects, **revocations(entry, serial=5)}, "OK", "acme/orders@1", policy),
    ]


@case("revocation_list_not_demanded", "The rule names revokers and demands no list; the tenant has none.")
def list_not_demanded(f: Forge) -> Step:
    return Step(f.objects(f.record()), "OK", "acme/orders@1", policy_text(REVOKERS))


@case("stale_list_warns", 'The list is too old and the rule says on_stale = "warn".')
def stale_list_warns(f: Forge) -> Step:
    policy = policy_text(REVOKERS, 'revocation = { max_age = "1h", on_stale = "warn" }')
    return Step({**f.objects(f.record()), **revocations()}, "OK", "acme/orders@1", policy)


@case("attestation_of_the_builder", "The rule demands provenance by a builder, and it is attached.")
def attestation(f: Forge) -> Step:
    record = f.record()
    record = f.record(attest=(f.attestation(record, kind=SLSA),))
    wanted = f'attestations = [{{ type = "{SLSA}", keys = {key_list("builder")}, builder = "https://ci.example/1" }}]'
    return Step(f.objects(record), "OK", "acme/orders@1", policy_text(wanted))


@case(
    "attestation_of_a_stranger_too",
    "Besides the one demanded there is one of a key nobody listed: not looked at.",
)
def attestation_of_stranger(f: Forge) -> Step:
    record = f.record()
    attest = (
        f.attestation(record, key="stranger", kind=SLSA),
        f.attestation(record, kind=SLSA),
    )
    wanted = f'attestations = [{{ type = "{SLSA}", keys = {key_list("builder")} }}]'
    return Step(f.objects(f.record(attest=attest)), "OK", "acme/orders@1", policy_text(wanted))


@case(
    "audit_mode_accepts_a_stranger", "In audit mode a signature by a key that is not listed is only reported."
)
def audit_mode(f: Forge) -> Step:
    return Step(f.objects(f.record(key="stranger")), "OK", "acme/orders@1", policy_text('mode = "audit"'))


@case("annotations", "Annotations are signed and given no meaning.")
def annotations(f: Forge) -> Step:
    return Step(f.objects(f.record(annotations=(("licence", "Apache-2.0"),))), "OK", "acme/orders@1")


@case(
    "stale_copy_in_tag",
    "A tag's copy of the record has another bundle than the version's own; both are good.",
)
def stale_copy(f: Forge) -> Step:
    record, resigned = f.record(key="ci2"), f.record(key="ci")
    return Step({**f.objects(resigned), **tag(record)}, "OK", policy=policy_text(keys=("ci", "ci2")))


def with_pending(f: Forge) -> dict[str, bytes]:
    """Version 2 as a reservation."""
    value = {"fmt": 1, "state": "pending", "pid": "0" * 32, "by": signer("ci").keyid, "t": 1, "lease_s": 3600}
    return {"t/acme/a/orders/v/2.json": canonical(json.loads(json.dumps(value)))}


@case("newest_is_pending", "A push in progress is not there: the newest committed version is older.")
def newest_is_pending(f: Forge) -> Step:
    return Step({**f.objects(f.record()), **with_pending(f)}, "OK", "acme/orders")


@case("statement_ignores_git", "Paths that stock signers leave out and no reader of an adapter ever opens.")
def ignores_git(f: Forge) -> Step:
    objects = f.objects(f.record())
    key = "t/acme/a/orders/v/1.json"
    return Step(
        {**objects, key: edited(objects[key], serialization(ignore_paths=[".git"]))}, "OK", "acme/orders@1"
    )
