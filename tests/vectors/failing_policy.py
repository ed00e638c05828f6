"""Vectors that must be refused because of what the policy says: rules, roles, dates, freshness, limits."""

from dataclasses import replace

from loraplex_registry.format.record import Encryption
from loraplex_registry.trust.revocations import Revocation
from tests.registry.forge import Forge, edited, key_list, policy_text, revocations, signer, tag
from tests.vectors.generate import Step, case
from tests.vectors.passing import LIST_DEMANDED, NEVER_FRESH, REVOKERS, SEPARATE, SLSA, THRESHOLD

ONE = "acme/orders@1"
HEAD = 'version = 1\ndefault = "deny"\n'
RULE = '[[rules]]\nscope = "acme/**"\nalgorithms = ["ed25519"]\nkeys = [{ path = "keys/ci.pub" }]\n'


def _policies() -> None:
    """Policies that are no policy, or do not cover the adapter; the objects are good."""
    table = {
        "policy_without_rules": ("A policy without rules trusts nothing.", "POLICY_REFUSED", HEAD),
        "policy_of_another_tenant": (
            "No rule covers acme.",
            "POLICY_REFUSED",
            policy_text(scope="globex/**"),
        ),
        "policy_of_a_longer_name": (
            "A rule of acme/orders2 does not cover acme/orders.",
            "POLICY_REFUSED",
            policy_text(scope="acme/orders2"),
        ),
        "policy_default_allow": (
            'The only default is "deny".',
            "POLICY_REFUSED",
            HEAD.replace("deny", "allow") + RULE,
        ),
        "policy_unknown_key": (
            "A misspelt demand must not be a demand that is not made.",
            "POLICY_REFUSED",
            HEAD + RULE + 'encrytion = "required"\n',
        ),
        "policy_unknown_version": ("A policy of a later version.", "POLICY_REFUSED", "version = 2\n" + RULE),
        "policy_damaged": ("Half a policy is no policy.", "POLICY_REFUSED", HEAD + RULE[:40]),
        "policy_empty": ("An empty file is no policy.", "POLICY_REFUSED", "\n"),
        "policy_key_id_of_another": (
            "The policy states a key id, and the file holds another key.",
            "POLICY_REFUSED",
            HEAD + RULE.replace(" }]", f', keyid = "{signer("ci2").keyid}" }}]'),
        ),
        "policy_ed25519_by_default": (
            "An Ed25519 key signs adapters only where the rule says so.",
            "POLICY_REFUSED",
            HEAD + RULE.replace('algorithms = ["ed25519"]\n', ""),
        ),
        "policy_two_rules_one_scope": ("Exactly one rule may decide.", "POLICY_REFUSED", HEAD + RULE + RULE),
        "policy_list_demanded_without_revokers": (
            "A list that nobody may sign cannot be demanded.",
            "POLICY_REFUSED",
            HEAD + RULE + 'revocation = { max_age = "1h" }\n',
        ),
        "policy_threshold_out_of_reach": (
            "Three signatures of two keys.",
            "POLICY_REFUSED",
            policy_text(
                f"tags = {{ prod = {{ threshold = 3, taggers = {key_list('release', 'release2')} }} }}"
            ),
        ),
        "narrow_rule_decides": (
            "The broad rule lists the key, the narrow one that decides does not.",
            "SIGNATURE_INVALID",
            policy_text() + policy_text(keys=("ci2",), scope="acme/orders", head=False),
        ),
        "key_not_listed": (
            "Signed by a key that the rule does not list.",
            "SIGNATURE_INVALID",
            policy_text(keys=("ci2",)),
        ),
        "key_of_another_role": (
            "The key is a tagger, a revoker and a builder here, and none of these signs adapters.",
            "SIGNATURE_INVALID",
            policy_text(
                f"taggers = {key_list('ci')}",
                f"revokers = {key_list('ci')}",
                f'attestations = [{{ type = "{SLSA}", keys = {key_list("ci")} }}]',
                keys=("ci2",),
            ),
        ),
        "key_expired": ("The key counted until 2020.", "EXPIRED", policy_text(keys=("ci to 2020-01-01",))),
        "key_not_yet_valid": (
            "The key counts from 9000 on.",
            "EXPIRED",
            policy_text(keys=("ci from 9000-01-01",)),
        ),
        "rank_above_limit": (
            "Rank 2 where the rule allows 1.",
            "RANK_TOO_LARGE",
            policy_text("limits = { max_rank = 1 }"),
        ),
        "bytes_above_limit": (
            "More bytes than the rule allows.",
            "POLICY_REFUSED",
            policy_text("limits = { max_bytes = 100 }"),
        ),
        "base_not_listed": (
            "For a base model that the rule does not list.",
            "POLICY_REFUSED",
            policy_text(f'limits = {{ bases = ["sha256:{"0" * 64}"] }}'),
        ),
        "version_below_minimum": (
            "Version 1 where the rule pins at least 2: an old vulnerable version.",
            "POLICY_REFUSED",
            policy_text("limits = { min_version = 2 }"),
        ),
        "version_below_semantic_minimum": (
            "Version 1 where the rule pins at least 1.0.1.",
            "POLICY_REFUSED",
            policy_text('limits = { min_version = "1.0.1" }'),
        ),
        "not_encrypted": (
            "The rule demands encryption and the version lies in clear.",
            "POLICY_REFUSED",
            policy_text('encryption = "required"'),
        ),
        "attestation_missing": (
            "The rule demands provenance and there is none.",
            "POLICY_REFUSED",
            policy_text(f'attestations = [{{ type = "{SLSA}", keys = {key_list("builder")} }}]'),
        ),
        "revocation_list_missing": (
            "The rule demands a list and the tenant has none: it may have been withheld.",
            "EXPIRED",
            policy_text(LIST_DEMANDED),
        ),
    }
    for name, (why, expect, policy) in table.items():

        def make(f: Forge, expect: str = expect, policy: str = policy) -> Step:
            return Step(f.objects(f.record()), expect, ONE, policy)

        case(f"{name}_fail", why)(make)


_policies()


@case("encryption_downgrade_fail", "The ciphertext was replaced by plaintext and the record's enc removed.")
def encryption_downgrade(f: Forge) -> list[Step]:
    policy = policy_text('encryption = "required"')
    record = f.record()
    return [Step({**f.objects(record), **tag(record)}, "POLICY_REFUSED", policy=policy)]


@case("encryption_forbidden_fail", "The rule forbids encryption and the record says it is encrypted.")
def encryption_forbidden(f: Forge) -> Step:
    record = f.record(encryption=Encryption("tink-AES256_GCM_HKDF_1MB", "file:acme", b"wrapped"))
    sealed = tuple(
        file if file.inline is None else replace(file, inline=file.inline + b"\0" * 64)
        for file in record.files
    )
    objects = f.objects(replace(record, files=sealed))
    return Step(objects, "POLICY_REFUSED", ONE, policy_text('encryption = "forbidden"'))


def _attested(
    f: Forge, *, about: int = 1, key: str = "builder", kind: str = SLSA, builder: str = "https://ci.example/1"
):
    return f.record(
        attest=(f.attestation(f.record(about, seed=about - 1), key=key, kind=kind, builder=builder),)
    )


def _attestations() -> None:
    wanted = f'attestations = [{{ type = "{SLSA}", keys = {key_list("builder")}, builder = "https://ci.example/1" }}]'
    expired = wanted.replace('builder.pub"', 'builder.pub", to = 2020-01-01')
    table = {
        "attestation_by_stranger": (
            "Signed by a key the rule does not list for it.",
            {"key": "stranger"},
            "POLICY_REFUSED",
            wanted,
        ),
        "attestation_by_adapter_key": (
            "An adapter key does not sign attestations.",
            {"key": "ci"},
            "POLICY_REFUSED",
            wanted,
        ),
        "attestation_of_another_builder": (
            "Built by somebody else.",
            {"builder": "https://evil.example"},
            "POLICY_REFUSED",
            wanted,
        ),
        "attestation_of_another_type": (
            "Another statement than demanded.",
            {"kind": "https://example.com/eval/v1"},
            "POLICY_REFUSED",
            wanted,
        ),
        "attestation_of_another_version": (
            "A genuine statement about version 2.",
            {"about": 2},
            "SIGNATURE_INVALID",
            wanted,
        ),
        "attestation_key_expired": ("The builder's key counted until 2020.", {}, "EXPIRED", expired),
    }
    for name, (why, changes, expect, line) in table.items():

        def make(f: Forge, changes: dict = changes, expect: str = expect, line: str = line) -> Step:
            return Step(f.objects(_attested(f, **changes)), expect, ONE, policy_text(line))

        case(f"{name}_fail", why)(make)

    def revoked(f: Forge) -> Step:
        listed = revocations(Revocation("stolen", keyid=signer("builder").keyid))
        return Step({**f.objects(_attested(f)), **listed}, "REVOKED", ONE, policy_text(wanted, REVOKERS))

    case("attestation_key_revoked_fail", "The builder's key is on the revocation list.")(revoked)


_attestations()


def _tags() -> None:
    """Tags that must be refused; each names keys, changes to the statement, the policy's lines and the verdict."""
    aged = 'tags = { prod = { max_age = "1h" } }'
    table = {
        "tag_by_adapter_key": (
            "The rule has taggers of its own: an adapter key moves no tag.",
            ("ci",),
            {},
            (SEPARATE,),
            "SIGNATURE_INVALID",
        ),
        "tag_by_stranger": (
            "A tag signed by a key nobody listed.",
            ("stranger",),
            {},
            (),
            "SIGNATURE_INVALID",
        ),
        "tag_expired": (
            "A tag that expired in 2026 is frozen, not current.",
            ("ci",),
            {"expires": "2026-06-02T00:00:00Z"},
            (),
            "EXPIRED",
        ),
        "tag_too_old": ("The rule allows tags issued within the hour.", ("ci",), {}, (aged,), "EXPIRED"),
        "tag_from_the_future": (
            "Issued in 9000.",
            ("ci",),
            {"issued": "9000-01-01T00:00:00Z"},
            (),
            "EXPIRED",
        ),
        "tag_below_threshold": (
            "One of the two signatures the rule demands.",
            ("release",),
            {},
            (THRESHOLD,),
            "SIGNATURE_INVALID",
        ),
        "tag_threshold_by_stranger": (
            "The second signature is of a key nobody listed.",
            ("release", "stranger"),
            {},
            (THRESHOLD,),
            "SIGNATURE_INVALID",
        ),
        "tag_threshold_by_role_keys": (
            "The second signature is of the rule's taggers, not of this tag's.",
            ("release", "ci"),
            {},
            (THRESHOLD,),
            "SIGNATURE_INVALID",
        ),
        "tag_key_expired": (
            "The tagger's key counted until 2020.",
            ("release",),
            {},
            (f"taggers = {key_list('release to 2020-01-01')}",),
            "EXPIRED",
        ),
        "tag_threshold_with_expired_key": (
            "Two signatures, of which one is by a key that has expired.",
            ("release", "release2"),
            {},
            (
                "tags = { prod = { threshold = 2, "
                f"taggers = {key_list('release to 2020-01-01', 'release2', 'release3')} }} }}",
            ),
            "EXPIRED",
        ),
        "tag_says_another_version": (
            "The statement names version 2, the record is version 1.",
            ("ci",),
            {"version": 2},
            (),
            "DIGEST_MISMATCH",
        ),
        "tag_says_another_digest": (
            "The statement names another digest than the record has.",
            ("ci",),
            {"manifest_sha256": "0" * 64},
            (),
            "SIGNATURE_INVALID",
        ),
    }
    for name, (why, keys, changes, lines, expect) in table.items():

        def make(f: Forge, keys=keys, changes=changes, lines=lines, expect: str = expect) -> Step:
            record = f.record()
            return Step(
                {**f.objects(record), **tag(record, keys=keys, **changes)}, expect, policy=policy_text(*lines)
            )

        case(f"{name}_fail", why)(make)


_tags()


@case(
    "tag_threshold_bad_signature_fail",
    "Two good signatures and a bad one by a listed key: the whole is refused.",
)
def threshold_bad_signature(f: Forge) -> Step:
    record = f.record()
    good = tag(record, keys=("release", "release2", "release3"))
    other = tag(record, 2, keys=("release", "release2", "release3"))
    (key,) = good
    import json

    swapped = json.loads(other[key])["tag"]["signatures"][0]
    body = edited(good[key], lambda value: value["tag"]["signatures"].__setitem__(0, swapped))
    return Step({**f.objects(record), key: body}, "SIGNATURE_INVALID", policy=policy_text(THRESHOLD))


@case("tag_threshold_one_key_twice_fail", "The same signature twice is one signature.")
def threshold_twice(f: Forge) -> Step:
    record = f.record()
    good = tag(record, keys=("release",))
    (key,) = good
    body = edited(good[key], lambda value: value["tag"].update(signatures=value["tag"]["signatures"] * 2))
    return Step({**f.objects(record), key: body}, "SIGNATURE_INVALID", policy=policy_text(THRESHOLD))


def _remembered() -> None:
    """Attacks that only a memory of what was seen can stop."""

    @case("tag_rollback_fail", "An earlier genuine tag is put back.")
    def rollback(f: Forge) -> list[Step]:
        first, second = f.record(1), f.record(2, seed=1)
        both = {**f.objects(first), **f.objects(second, seed=1)}
        return [Step({**both, **tag(second, 2)}, "OK"), Step({**both, **tag(first, 1)}, "ROLLBACK")]

    @case("tag_fork_fail", "Two statements were signed for one generation.")
    def fork(f: Forge) -> list[Step]:
        first, second = f.record(1), f.record(2, seed=1)
        both = {**f.objects(first), **f.objects(second, seed=1)}
        return [Step({**both, **tag(second, 2)}, "OK"), Step({**both, **tag(first, 2)}, "ROLLBACK")]

    @case("tag_put_back_after_removal_fail", "The tag was removed; the statement before is put back.")
    def put_back(f: Forge) -> list[Step]:
        record = f.record()
        objects = f.objects(record)
        return [
            Step({**objects, **tag(record, 1)}, "OK"),
            Step({**objects, **tag(None, 2)}, "ADAPTER_NOT_FOUND"),
            Step({**objects, **tag(record, 1)}, "ROLLBACK"),
        ]

    @case("tag_rollback_by_second_key_fail", "An earlier tag signed by another listed key is put back.")
    def second_key(f: Forge) -> list[Step]:
        record = f.record()
        objects, policy = f.objects(record), policy_text(f"taggers = {key_list('release', 'release2')}")
        return [
            Step({**objects, **tag(record, 5, keys=("release",))}, "OK", policy=policy),
            Step({**objects, **tag(record, 4, keys=("release2",))}, "ROLLBACK", policy=policy),
        ]

    @case("rollback_in_audit_mode_fail", "Audit mode waives who may sign, not that time goes forward.")
    def in_audit_mode(f: Forge) -> list[Step]:
        record = f.record()
        objects, policy = f.objects(record), policy_text('mode = "audit"')
        return [
            Step({**objects, **tag(record, 2)}, "OK", policy=policy),
            Step({**objects, **tag(record, 1)}, "ROLLBACK", policy=policy),
        ]

    @case("revocation_rollback_fail", "The list before the revocation is put back.")
    def list_rollback(f: Forge) -> list[Step]:
        objects, policy = f.objects(f.record()), policy_text(LIST_DEMANDED)
        entry = Revocation("bad", digest=f.record().digest)
        return [
            Step({**objects, **revocations(entry, serial=2)}, "REVOKED", ONE, policy),
            Step({**objects, **revocations(serial=1)}, "ROLLBACK", ONE, policy),
        ]

    @case("revocation_fork_fail", "Two lists were signed with one serial.")
    def list_fork(f: Forge) -> list[Step]:
        objects, policy = f.objects(f.record()), policy_text(LIST_DEMANDED)
        entry = Revocation("bad", digest=f.record(2, seed=1).digest)
        return [
            Step({**objects, **revocations(entry, serial=2)}, "OK", ONE, policy),
            Step({**objects, **revocations(serial=2)}, "ROLLBACK", ONE, policy),
        ]

    @case("revocation_list_removed_fail", "A list was seen, and now there is none.")
    def list_removed(f: Forge) -> list[Step]:
        objects, policy = f.objects(f.record()), policy_text(REVOKERS)
        return [
            Step({**objects, **revocations(serial=2)}, "OK", ONE, policy),
            Step(objects, "ROLLBACK", ONE, policy),
        ]


_remembered()


def _revocations() -> None:
    """Revocation lists; the version is good and signed by `ci`."""
    ci, demanded = signer("ci").keyid, policy_text(LIST_DEMANDED)

    def listed(*entries: Revocation, **options: object):
        return lambda f: revocations(*entries, **options)

    table = {
        "revoked_version": (
            "The version is on the list.",
            lambda f: revocations(Revocation("bad", digest=f.record().digest)),
            "REVOKED",
            demanded,
        ),
        "revoked_key": (
            "The key that signed is on the list.",
            listed(Revocation("stolen", keyid=ci)),
            "REVOKED",
            demanded,
        ),
        "revoked_key_since_before": (
            "The key is revoked for what it signed since May; this is from June.",
            listed(Revocation("stolen", keyid=ci, since="2026-05-01T00:00:00Z")),
            "REVOKED",
            demanded,
        ),
        "revoked_key_since_then": (
            "The key is revoked since the very second this was signed.",
            listed(Revocation("stolen", keyid=ci, since="2026-06-01T12:00:00Z")),
            "REVOKED",
            demanded,
        ),
        "revoked_in_audit_mode": (
            "Audit mode does not waive a revocation.",
            listed(Revocation("stolen", keyid=ci)),
            "REVOKED",
            policy_text(LIST_DEMANDED, 'mode = "audit"'),
        ),
        "revoked_by_a_stale_list": (
            "An entry counts however old its list is.",
            listed(Revocation("stolen", keyid=ci)),
            "REVOKED",
            policy_text(REVOKERS, 'revocation = { max_age = "1h", on_stale = "warn" }'),
        ),
        "revocation_list_stale": (
            "The list was issued more than an hour ago: a freeze.",
            listed(),
            "EXPIRED",
            policy_text(NEVER_FRESH),
        ),
        "revocation_list_expired": (
            "The list says it expired in 2026.",
            listed(expires="2026-06-02T00:00:00Z"),
            "EXPIRED",
            demanded,
        ),
        "revocation_list_from_the_future": (
            "Issued in 9000.",
            listed(issued="9000-01-01T00:00:00Z"),
            "EXPIRED",
            demanded,
        ),
        "revocation_list_by_adapter_key": (
            "An adapter key revokes nothing.",
            listed(keys=("ci",)),
            "SIGNATURE_INVALID",
            demanded,
        ),
        "revocation_list_of_another_tenant": (
            "The genuine list of globex, by the same security key, under acme.",
            listed(tenant="globex", under="acme"),
            "SIGNATURE_INVALID",
            demanded,
        ),
        "revocation_list_by_expired_key": (
            "The revoker's key counted until 2020.",
            listed(),
            "EXPIRED",
            policy_text(
                f"revokers = {key_list('security to 2020-01-01')}", 'revocation = { max_age = "36500d" }'
            ),
        ),
        "revocation_list_damaged": (
            "A list that cannot be read is no list.",
            lambda f: {"t/acme/revocations.json": b'{"fmt":1}'},
            "DIGEST_MISMATCH",
            demanded,
        ),
        "revocation_list_entry_removed": (
            "An entry was taken off, the signature left as it was.",
            lambda f: _without_entries(revocations(Revocation("bad", digest=f.record().digest))),
            "SIGNATURE_INVALID",
            demanded,
        ),
    }
    for name, (why, make_list, expect, policy) in table.items():

        def make(f: Forge, make_list=make_list, expect: str = expect, policy: str = policy) -> Step:
            return Step({**f.objects(f.record()), **make_list(f)}, expect, ONE, policy)

        case(f"{name}_fail", why)(make)


def _without_entries(objects: dict[str, bytes]) -> dict[str, bytes]:
    from loraplex_registry.format.canonical import b64encode
    from loraplex_registry.trust.revocations import parse_revocations

    (key,) = objects
    found = parse_revocations(objects[key], tenant="acme")
    payload = b64encode(replace(found.statement, entries=()).to_bytes())
    return {key: edited(objects[key], lambda value: value["list"].update(payload=payload))}


_revocations()


@case("revoked_tagger_fail", "The tag was signed by a key that is on the list; the version's key is not.")
def revoked_tagger(f: Forge) -> Step:
    record = f.record()
    listed = revocations(Revocation("stolen", keyid=signer("release").keyid))
    objects = {**f.objects(record), **tag(record, keys=("release",)), **listed}
    return Step(objects, "REVOKED", policy=policy_text(SEPARATE, LIST_DEMANDED))


@case(
    "revoked_tagger_below_threshold_fail", "Two signatures, one by a revoked key: one counts, two are needed."
)
def revoked_tagger_threshold(f: Forge) -> Step:
    record = f.record()
    listed = revocations(Revocation("stolen", keyid=signer("release").keyid))
    objects = {**f.objects(record), **tag(record, keys=("release", "release2")), **listed}
    return Step(objects, "REVOKED", policy=policy_text(THRESHOLD, LIST_DEMANDED))
