"""DSSE envelopes with one to eight signatures: the laws their module states, and every other form refused."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_registry.errors import SettingsError, SignatureInvalidError
from loraplex_registry.format.canonical import b64encode, canonical
from loraplex_registry.signing import (
    PAYLOAD_BYTES_MAX,
    SIGNATURES_MAX,
    PublicKey,
    Signer,
    cosign_envelope,
    envelope_keyid,
    envelope_keyids,
    payload_unverified,
    sign_envelope,
    verify_envelope,
)
from tests.registry.builders import make_signer

TYPE = "application/vnd.loraplex.test+json"


@pytest.fixture(scope="session")
def signers(tmp_path_factory: pytest.TempPathFactory) -> list[Signer]:
    """One signer more than an envelope may have."""
    directory: Path = tmp_path_factory.mktemp("signers")
    return [make_signer(directory, f"k{number}") for number in range(SIGNATURES_MAX + 1)]


def keys_of(signers: list[Signer]) -> list[PublicKey]:
    return [signer.public_key for signer in signers]


@settings(max_examples=30, deadline=None)
@given(
    payload=st.binary(max_size=300), chosen=st.sets(st.integers(0, SIGNATURES_MAX), min_size=1, max_size=8)
)
def test_what_any_keys_sign_verifies_with_every_subset_of_them(
    payload: bytes, chosen: set[int], signers: list[Signer]
) -> None:
    signing = [signers[index] for index in chosen]
    envelope = sign_envelope(payload, TYPE, *signing)
    assert envelope_keyids(envelope) == tuple(sorted(signer.keyid for signer in signing))
    assert verify_envelope(envelope, TYPE, keys_of(signing)) == payload == payload_unverified(envelope)
    for signer in signing:
        assert verify_envelope(envelope, TYPE, signer.public_key) == payload
    absent = next(signer for index, signer in enumerate(signers) if index not in chosen)
    with pytest.raises(SignatureInvalidError, match="did not sign"):
        verify_envelope(envelope, TYPE, [signing[0].public_key, absent.public_key])


def test_signing_one_after_the_other_has_the_form_of_signing_at_once(signers: list[Signer]) -> None:
    one_by_one = functools.reduce(
        cosign_envelope, reversed(signers[1:4]), sign_envelope(b"p", TYPE, signers[0])
    )
    assert [item["keyid"] for item in one_by_one["signatures"]] == sorted(s.keyid for s in signers[:4])
    assert verify_envelope(one_by_one, TYPE, keys_of(signers[:4])) == b"p"


def test_cosigning_leaves_the_envelope_given_alone_and_replaces_its_own_signature(
    signers: list[Signer],
) -> None:
    first = sign_envelope(b"p", TYPE, signers[0])
    before = copy.deepcopy(first)
    again = cosign_envelope(first, signers[0])
    assert first == before
    assert len(again["signatures"]) == 1
    assert verify_envelope(again, TYPE, signers[0].public_key) == b"p"


def test_no_more_than_eight_signatures_fit(signers: list[Signer]) -> None:
    full = sign_envelope(b"p", TYPE, *signers[:SIGNATURES_MAX])
    assert verify_envelope(full, TYPE, keys_of(signers[:SIGNATURES_MAX])) == b"p"
    with pytest.raises(SignatureInvalidError, match="no more fit"):
        cosign_envelope(full, signers[-1])
    with pytest.raises(SettingsError):
        sign_envelope(b"p", TYPE, *signers)


@pytest.mark.parametrize("case", ["none", "twice", "long payload", "long type", "no type"])
def test_what_cannot_be_signed_is_refused(case: str, signers: list[Signer]) -> None:
    arguments: dict[str, Any] = {
        "none": (b"", TYPE),
        "twice": (b"", TYPE, signers[0], signers[0]),
        "long payload": (bytes(PAYLOAD_BYTES_MAX + 1), TYPE, signers[0]),
        "long type": (b"", "t" * 129, signers[0]),
        "no type": (b"", "", signers[0]),
    }
    with pytest.raises(SettingsError):
        sign_envelope(*arguments[case])


def test_no_key_verifies_nothing(signers: list[Signer]) -> None:
    with pytest.raises(SignatureInvalidError, match="No key"):
        verify_envelope(sign_envelope(b"p", TYPE, signers[0]), TYPE, [])


def test_a_payload_signed_as_one_type_never_verifies_as_another(signers: list[Signer]) -> None:
    envelope = sign_envelope(b"p", TYPE, signers[0])
    with pytest.raises(SignatureInvalidError, match="another type"):
        verify_envelope(envelope, TYPE + "x", signers[0].public_key)
    with pytest.raises(SignatureInvalidError, match="does not verify"):
        verify_envelope({**envelope, "payloadType": TYPE + "x"}, TYPE + "x", signers[0].public_key)


def test_one_bad_signature_among_the_keys_given_refuses_all(signers: list[Signer]) -> None:
    envelope = sign_envelope(b"p", TYPE, *signers[:3])
    other = sign_envelope(b"q", TYPE, *signers[:3])
    envelope["signatures"][1]["sig"] = other["signatures"][1]["sig"]
    bad = envelope["signatures"][1]["keyid"]
    good = [signer.public_key for signer in signers[:3] if signer.keyid != bad]
    assert verify_envelope(envelope, TYPE, good) == b"p"
    with pytest.raises(SignatureInvalidError):
        verify_envelope(envelope, TYPE, keys_of(signers[:3]))


def test_one_signature_is_told_from_several(signers: list[Signer]) -> None:
    assert envelope_keyid(sign_envelope(b"p", TYPE, signers[0])) == signers[0].keyid
    with pytest.raises(SignatureInvalidError, match="2 signatures"):
        envelope_keyid(sign_envelope(b"p", TYPE, *signers[:2]))


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["signatures"].reverse(),
        lambda e: e["signatures"].append(e["signatures"][-1]),
        lambda e: e["signatures"].clear(),
        lambda e: e.update(signatures={}),
        lambda e: e["signatures"][0].update(extra=1),
        lambda e: e["signatures"][0].update(keyid=""),
        lambda e: e["signatures"][0].update(keyid=e["signatures"][0]["keyid"].upper()),
        lambda e: e["signatures"][0].update(sig=""),
        lambda e: e["signatures"][0].update(sig=b64encode(bytes(2000))),
        lambda e: e["signatures"][0].pop("keyid"),
        lambda e: e.update(payload="cA"),
        lambda e: e.update(payload="cB=="),
        lambda e: e.update(payload=None),
        lambda e: e.update(payload=b64encode(bytes(PAYLOAD_BYTES_MAX + 1))),
        lambda e: e.update(payloadType=["application/json"]),
        lambda e: e.update(payloadType=""),
        lambda e: e.update(more=1),
        lambda e: e.pop("payloadType"),
    ],
)
def test_an_envelope_of_another_form_is_refused(change: Any, signers: list[Signer]) -> None:
    envelope = sign_envelope(b"p", TYPE, *signers[:2])
    change(envelope)
    for use in (
        envelope_keyids,
        payload_unverified,
        lambda e: cosign_envelope(e, signers[2]),
        lambda e: verify_envelope(e, TYPE, signers[0].public_key),
    ):
        with pytest.raises(SignatureInvalidError):
            use(envelope)


@settings(max_examples=80, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_bit_of_an_envelope_can_change(position: int, bit: int, signers: list[Signer]) -> None:
    from loraplex_registry.format.canonical import StrictJsonError, parse

    body = bytearray(canonical(sign_envelope(b"payload", TYPE, *signers[:2])))
    body[position % len(body)] ^= 1 << bit
    try:
        changed = parse(bytes(body))
    except StrictJsonError:
        return
    with pytest.raises(SignatureInvalidError):
        verify_envelope(changed, TYPE, keys_of(signers[:2]))
