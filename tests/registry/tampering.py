"""The tamper campaign: whoever can write to the store, and holds no key, changes one thing at a time.

Every attempt runs the whole way: read the objects, decide, fetch every byte. It ends in one of two ways: a refusal by
an error of our tree with a reason code, or the very outcome of the untouched world, byte for byte. The second is
possible only for what is not signed because it decides nothing; the campaign counts such attempts apart.
"""

import copy
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplex_registry.delivery.fetch import stored_bytes
from loraplex_registry.errors import RegistryError
from loraplex_registry.format.canonical import StrictJsonError, b64decode, b64encode, canonical
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.trust.marks import MemoryMarks
from loraplex_registry.trust.revocations import Revocation
from loraplex_registry.trust.verdict import TrustPolicy, VerifiedManifest
from loraplex_registry.trust.verifier import Verifier
from tests.registry import forge
from tests.registry.forge import Forge, Objects

RECORD = "t/acme/a/orders/v/1.json"
TAG = "t/acme/a/orders/tags/prod.json"
LIST = "t/acme/revocations.json"
REASONS = frozenset(
    {
        "SIGNATURE_INVALID", "DIGEST_MISMATCH", "POLICY_REFUSED", "ADAPTER_NOT_FOUND", "EXPIRED", "REVOKED", "ROLLBACK",
        "RANK_TOO_LARGE", "BASE_MISMATCH", "UNSUPPORTED_ADAPTER",
    }
)  # fmt: skip
POLICY = forge.policy_text(
    f"taggers = {forge.key_list('release')}",
    f"revokers = {forge.key_list('security')}",
    'revocation = { max_age = "36500d" }',
)

Outcome = tuple[Any, ...]


@dataclass
class Tally:
    """What came of the attempts: refusals by reason, harmless ones, and the ones that must not exist."""

    refused: Counter[str] = field(default_factory=Counter)
    harmless: int = 0
    accepted: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        return sum(self.refused.values()) + self.harmless + len(self.accepted) + len(self.strange)

    def check(self) -> None:
        """Fail unless every attempt was refused with a reason, or harmless."""
        assert self.accepted == [], self.accepted[:3]
        assert self.strange == [], self.strange[:3]
        assert set(self.refused) <= REASONS


class World:
    """acme/orders with versions 1 and 2, a tag on its second generation, a revocation list with serial 2."""

    def __init__(self, place: Path) -> None:
        self.forge = f = Forge(place)
        forge.write_keys(place, "ci", "release", "security", "globex")
        (place / "policy.toml").write_text(
            POLICY + forge.policy_text(scope="globex/**", keys=("ci", "globex"), head=False)
        )
        self.policy = TrustPolicy.load(place / "policy.toml")
        # An attestation nobody asks for: the one part of a record that decides nothing.
        attest = (f.attestation(f.record(1), key="stranger", kind="https://slsa.dev/provenance/v1"),)
        self.record, self.other = f.record(1, attest=attest), f.record(2, seed=1)
        entry = Revocation("bad", digest=self.other.digest)
        self.objects: Objects = {
            **f.objects(self.record),
            **f.objects(self.other, seed=1),
            **forge.tag(self.record, 2, keys=("release",)),
            **forge.revocations(entry, serial=2),
        }
        self.older: Objects = {
            **forge.tag(self.other, 1, keys=("release",)),
            **forge.revocations(serial=1),
        }
        self.blob = next(key for key in self.objects if "/b/1~" in key)
        self.untouched = {ref: self.load({}, ref) for ref in ("acme/orders@1", "acme/orders@prod")}

    def load(self, changes: dict[str, bytes | None], ref: str, marks: MemoryMarks | None = None) -> Outcome:
        """Resolve, verify and read every byte after some objects were changed (None: removed)."""
        objects = {key: body for key, body in (self.objects | changes).items() if body is not None}
        store = forge.store_of(objects)
        registry = Registry(store)
        verifier = Verifier(registry, self.policy, marks=marks, now=lambda: forge.NOW)
        return _outcome(registry, store, verifier.verify(AdapterRef.parse(ref)))

    def attempt(
        self,
        tally: Tally,
        what: str,
        changes: dict[str, bytes | None],
        ref: str,
        marks: MemoryMarks | None = None,
    ) -> None:
        """Try one change and note what came of it."""
        try:
            outcome = self.load(changes, ref, marks)
        except RegistryError as error:
            tally.refused[error.code] += 1
        except Exception as error:  # anything but our errors is what the campaign looks for
            tally.strange.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if outcome == self.untouched.get(ref):
                tally.harmless += 1
            else:
                tally.accepted.append(what)


def _outcome(registry: Registry, store: Any, verified: VerifiedManifest) -> Outcome:
    files = tuple(stored_bytes(store, verified, file.name) for file in verified.manifest.files)
    return (
        verified.ref,
        verified.digest,
        verified.keyid,
        verified.scope,
        verified.tag,
        verified.tag_generation,
        files,
    )


def flips(body: bytes, positions: "range | list[int]") -> Iterator[bytes]:
    """The body with one bit flipped, for each position in bits."""
    for position in positions:
        changed = bytearray(body)
        changed[position // 8] ^= 1 << position % 8
        yield bytes(changed)


def _positions(body: bytes, share: float, rng: random.Random) -> "range | list[int]":
    bits = len(body) * 8
    return range(bits) if share >= 1 else rng.sample(range(bits), max(1, int(bits * share)))


def every_bit(world: World, what: str, share: float, seed: int = 1) -> Tally:
    """Flip every bit (or a share of them) of `record`, `tag`, `list`, `manifest`, `envelope` or `statement`.

    The last three are flipped inside their base64, which is made canonical again: the flip gets past the reader of
    the record, to the signature.
    """
    rng, tally = random.Random(seed), Tally()
    place, ref, body, put_back = _target(world, what)
    for number, changed in enumerate(flips(body, _positions(body, share, rng))):
        world.attempt(tally, f"{what} flip {number}", {place: put_back(changed)}, ref)
    return tally


def _target(world: World, what: str) -> tuple[str, str, bytes, Callable[[bytes], bytes]]:
    """Where the bits are, what is asked, the bytes, and how they are put back."""
    by_version, by_tag = "acme/orders@1", "acme/orders@prod"
    whole = {"record": (RECORD, by_version), "tag": (TAG, by_tag), "list": (LIST, by_version)}
    if what in whole:
        place, ref = whole[what]
        return place, ref, world.objects[place], lambda changed: changed
    paths: dict[str, tuple[str, str, list[Any]]] = {
        "manifest": (RECORD, by_version, ["manifest"]),
        "envelope": (RECORD, by_version, ["bundle", "dsseEnvelope", "payload"]),
        "signature": (RECORD, by_version, ["bundle", "dsseEnvelope", "signatures", 0, "sig"]),
        "tag statement": (TAG, by_tag, ["tag", "payload"]),
        "tag signature": (TAG, by_tag, ["tag", "signatures", 0, "sig"]),
        "list statement": (LIST, by_version, ["list", "payload"]),
        "list signature": (LIST, by_version, ["list", "signatures", 0, "sig"]),
    }
    place, ref, path = paths[what]

    def put_back(changed: bytes) -> bytes:
        value = json.loads(world.objects[place])
        _set(value, path, b64encode(changed))
        return canonical(value)

    return place, ref, b64decode(_get(json.loads(world.objects[place]), path)), put_back


TARGETS = (
    "record", "tag", "list", "manifest", "envelope", "signature", "tag statement", "tag signature", "list statement",
    "list signature",
)  # fmt: skip


def blob_bits(world: World, rounds: int, seed: int = 2) -> Tally:
    """Flip random bits of the weights."""
    rng, tally = random.Random(seed), Tally()
    body = world.objects[world.blob]
    positions = [rng.randrange(len(body) * 8) for _ in range(rounds)]
    for number, changed in enumerate(flips(body, positions)):
        world.attempt(tally, f"blob flip {number}", {world.blob: changed}, "acme/orders@1")
    return tally


def field_mutants(world: World, rounds: int, seed: int = 3) -> Tally:
    """Change fields: see `MUTATORS`. What was seen before is remembered, so that replays count as attempts too."""
    rng, tally = random.Random(seed), Tally()
    marks = MemoryMarks()
    world.load({}, "acme/orders@prod", marks)  # what an honest past left behind
    made = 0
    while made < rounds:
        place = rng.choice([RECORD, TAG, LIST])
        mutate = rng.choice(MUTATORS)
        try:
            what, changes = mutate(world, place, rng)
        except (StrictJsonError, LookupError):
            continue  # this mutation has no meaning at the place chosen
        if all(world.objects.get(key) == body for key, body in changes.items()):
            continue
        made += 1
        ref = "acme/orders@prod" if TAG in changes or rng.random() < 0.5 else "acme/orders@1"
        if RECORD in changes and TAG not in changes:
            ref = "acme/orders@1"  # a tag carries a copy of its own
        world.attempt(tally, f"{mutate.__name__} {what}", changes, ref, marks)
    return tally


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*at, key))


def _get(value: Any, path: Any) -> Any:
    for key in path:
        value = value[key]
    return value


def _set(value: Any, path: Any, new: Any) -> None:
    _get(value, path[:-1])[path[-1]] = new


def _opened(world: World, place: str, rng: random.Random) -> tuple[Any, Callable[[Any], bytes], str]:
    """An object's value, or the signed value inside it, and how to write it back with its signature kept."""
    outer = json.loads(world.objects[place])
    inner: dict[str, list[list[Any]]] = {
        RECORD: [["manifest"], ["bundle", "dsseEnvelope", "payload"]],
        TAG: [["tag", "payload"], ["record", "manifest"]],
        LIST: [["list", "payload"]],
    }
    if rng.random() < 0.4:
        return outer, canonical, "outer"
    path = rng.choice(inner[place])

    def put_back(value: Any) -> bytes:
        changed = copy.deepcopy(outer)
        _set(changed, path, b64encode(canonical(value)))
        return canonical(changed)

    return json.loads(b64decode(_get(outer, path))), put_back, "/".join(map(str, path))


Mutant = tuple[str, dict[str, bytes | None]]


def drop(world: World, place: str, rng: random.Random) -> Mutant:
    value, put_back, name = _opened(world, place, rng)
    path = rng.choice(list(_paths(value)))
    del _get(value, path[:-1])[path[-1]]
    return f"{place} {name} {path}", {place: put_back(value)}


def retype(world: World, place: str, rng: random.Random) -> Mutant:
    value, put_back, name = _opened(world, place, rng)
    path = rng.choice(list(_paths(value)))
    old = _get(value, path)
    choices = [None, True, False, 0, -1, 1.5, "", "x", [], {}, [old], {"a": old}, str(old), "9" * 400, 2**53]
    new = rng.choice([item for item in choices if item != old or type(item) is not type(old)])
    _set(value, path, new)
    return f"{place} {name} {path} {new!r:.40}", {place: put_back(value)}


def sibling(world: World, place: str, rng: random.Random) -> Mutant:
    """A field gets the value of another field."""
    value, put_back, name = _opened(world, place, rng)
    paths = list(_paths(value))
    path, source = rng.sample(paths, 2)
    _set(value, path, copy.deepcopy(_get(value, source)))
    return f"{place} {name} {path} from {source}", {place: put_back(value)}


def from_another(world: World, place: str, rng: random.Random) -> Mutant:
    """A field gets the value it has in another genuine object: another version, another tenant, an older one."""
    f = world.forge
    others = {
        RECORD: [
            world.other.to_bytes(),
            f.record(name="globex/orders", key="globex").to_bytes(),
            f.record(name="acme/billing").to_bytes(),
        ],
        TAG: [
            world.older[TAG],
            *forge.tag(
                f.record(name="globex/orders", key="globex"), name="globex/orders@prod", keys=("globex",)
            ).values(),
        ],
        LIST: [world.older[LIST], *forge.revocations(tenant="globex", serial=9).values()],
    }[place]
    value, source = json.loads(world.objects[place]), json.loads(rng.choice(others))
    path = rng.choice([path for path in _paths(value) if _has(source, path)])
    _set(value, path, _get(source, path))
    return f"{place} {path}", {place: canonical(value)}


def _has(value: Any, path: Any) -> bool:
    try:
        _get(value, path)
    except (LookupError, TypeError):
        return False
    return True


def duplicate(world: World, place: str, rng: random.Random) -> Mutant:
    """A list item twice, or a key twice in the text."""
    body = world.objects[place]
    if rng.random() < 0.5:
        key = rng.choice(
            [b'"fmt":', b'"payload":', b'"payloadType":', b'"sig":', b'"keyid":', b'"signatures":']
        )
        at = body.index(key) if key in body else _absent()
        return f"{place} {key!r}", {place: body[:at] + key + b"1," + body[at:]}
    value, put_back, name = _opened(world, place, rng)
    path = rng.choice(
        [path for path in _paths(value) if isinstance(_get(value, path), list) and _get(value, path)]
    )
    items = _get(value, path)
    items.insert(rng.randrange(len(items) + 1), copy.deepcopy(rng.choice(items)))
    return f"{place} {name} {path}", {place: put_back(value)}


def reorder(world: World, place: str, rng: random.Random) -> Mutant:
    value, put_back, name = _opened(world, place, rng)
    path = rng.choice(
        [path for path in _paths(value) if isinstance(_get(value, path), list) and len(_get(value, path)) > 1]
    )
    rng.shuffle(_get(value, path))
    return f"{place} {name} {path}", {place: put_back(value)}


def re_encode(world: World, place: str, rng: random.Random) -> Mutant:
    """The same value in another spelling."""
    value = json.loads(world.objects[place])
    spellings = [
        json.dumps(value).encode(),
        json.dumps(value, indent=1).encode(),
        json.dumps(value, separators=(",", ":"), sort_keys=True).encode() + b"\n",
        b"\xef\xbb\xbf" + world.objects[place],
        world.objects[place].decode().encode("utf-16"),
        world.objects[place].replace(b"a", b"\\u0061", rng.randint(1, 9)),
        world.objects[place].replace(b":1", b":1.0", 1),
        world.objects[place].replace(b":1", b":1e0", 1),
    ]
    return place, {place: rng.choice(spellings)}


def replay(world: World, place: str, rng: random.Random) -> Mutant:
    """An older genuine tag or list, or a genuine object of another place."""
    everything = [
        *world.older.items(),
        *((key, body) for key, body in world.objects.items() if "/b/" not in key),
    ]
    source, body = rng.choice(everything)
    return f"{source} at {place}", {place: body}


def remove(world: World, place: str, rng: random.Random) -> Mutant:
    """The object is gone, or the blob is."""
    gone = rng.choice([place, world.blob])
    return gone, {gone: None}


def _absent() -> int:
    raise LookupError("no such key")


MUTATORS = (
    drop,
    drop,
    retype,
    retype,
    sibling,
    from_another,
    from_another,
    duplicate,
    reorder,
    re_encode,
    replay,
    remove,
)


def transplants(world: World, tally: Tally) -> None:
    """Everything of acme/orders under every other name."""
    for name in ("globex/orders", "acme/billing", "globex/billing", "acme/orders2"):
        tenant, adapter = name.split("/")
        moved = {
            key.replace("t/acme/a/orders/", f"t/{tenant}/a/{adapter}/"): body
            for key, body in world.objects.items()
        }
        for selector in ("@1", "@2", "@prod", ""):
            world.attempt(tally, f"{name}{selector}", dict(moved), name + selector)


def new_world() -> World:
    """A world in a directory of its own."""
    return World(Path(tempfile.mkdtemp(prefix="loraplex-tamper-")))
