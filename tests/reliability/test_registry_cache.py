"""The cache under kill -9, under attack between check and load, and on a full disk; the stores that lie."""

import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save

from loraplex_registry.delivery.cache import Cache
from loraplex_registry.delivery.handoff import hand_off
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.trust.verdict import TrustPolicy, VerifiedManifest
from loraplex_registry.validation.base import BaseModel
from tests.registry import builders
from tests.registry.cache_campaigns import ROOT, kill_campaign, swap_campaign

pytestmark = pytest.mark.reliability

Figure = Callable[..., None]
REF = AdapterRef.parse("acme/orders")

FULL_DISK = """
import os, random, sys
sys.path.insert(0, {root!r})
from loraplex_registry.delivery.cache import Cache
from loraplex_registry.errors import StoreUnavailableError
from tests.registry.cache_campaigns import body_of, digest_of, maker
rng = random.Random({seed})
cache = Cache({place!r} + "/cache", max_bytes=1 << 40)
held, full = [], 0
for number in range(300):
    size = rng.randrange(20_000, 400_000)
    try:
        lease = cache.obtain(digest_of(number), size_bytes=size, make=maker(number, size))
    except StoreUnavailableError:
        full += 1
        while held:
            held.pop().close()
        continue
    with lease.open("data") as file:
        assert file.read() == body_of(number, size)
    if rng.random() < 0.4:
        held.append(lease)
    else:
        lease.close()
assert not [name for name in os.listdir({place!r} + "/cache") if name.startswith(".tmp-")]
print(full)
"""


@pytest.fixture
def verified(
    local_registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy
) -> VerifiedManifest:
    """One adapter, published."""
    local_registry.initialise()
    local_registry.publish(adapter, REF, signer, base)
    return local_registry.verify(local_registry.resolve(REF), policy)


def test_registry_cache_users_killed(tmp_path: Path, seed: int, figure: Figure) -> None:
    found = kill_campaign(tmp_path, kills=200, seed=seed)
    print(dict(found))
    figure("cache: users killed", found["kills"], ">= 200", found["kills"] >= 200)
    figure("cache: left after kills", found["temporaries left"], "0", found["temporaries left"] == 0)
    figure("cache: bytes over the cap", found["bytes over the cap"], "0", found["bytes over the cap"] == 0)


@pytest.mark.parametrize("sealed", [True, False])
def test_registry_cache_swapped(
    local_registry: Registry,
    verified: VerifiedManifest,
    base: BaseModel,
    tmp_path: Path,
    seed: int,
    figure: Figure,
    sealed: bool,
) -> None:
    evil = save(builders.adapter_tensors(seed=99))
    found = swap_campaign(
        local_registry, verified, base, tmp_path / "cache", evil=evil, rounds=500, seed=seed, sealed=sealed
    )
    print(dict(found))
    how = "sealed" if sealed else "in place"
    if sealed:
        figure(f"swaps {how}: served wrong", found["served wrong"], "0", found["served wrong"] == 0)
    else:  # documented as weaker: whole directories swapped out and back, files mapped before the check
        share = found["served wrong"] / found["rounds"]
        figure(f"swaps {how}: served wrong", round(share, 3), "<= 0.02 (documented)", share <= 0.02)
    figure(f"swaps {how}: rounds served", found["served right"], ">= 50", found["served right"] >= 50)
    figure(
        f"swaps {how}: wrong bytes caught after the read",
        found["engine read something else"] - found["served wrong"],
        "reported",
        True,
    )


def test_registry_cache_on_a_full_disk(tmp_path: Path, seed: int, figure: Figure) -> None:
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    place = tmp_path / "small"
    place.mkdir()
    code = tmp_path / "full.py"
    code.write_text(FULL_DISK.format(root=str(ROOT), seed=seed, place=str(place)))
    script = f"mount -t tmpfs -o size=2m,mode=700 none {place} && exec {sys.executable} {code}"
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    done = subprocess.run([*mount, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figure("cache: full disks survived", int(done.stdout), ">= 5", int(done.stdout) >= 5)


def test_registry_cache_cost_of_sealing(
    local_registry: Registry,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
    figure: Figure,
) -> None:
    """What sealed memory costs over the bare directory, for an adapter in the cache."""
    import numpy as np

    wide = BaseModel("wide", base.digest, {"model.layers.0.self_attn.q_proj": (16384, 16384)}, 40, 16384, 128)
    rng = np.random.default_rng(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": rng.standard_normal((512, 16384)).astype(np.float32),
        f"{name}.lora_B.weight": rng.standard_normal((16384, 512)).astype(np.float32),
    }
    config = builders.adapter_config(rank=512, target_modules=["q_proj"])
    local_registry.initialise()
    directory = builders.make_adapter(tmp_path / "big", tensors=tensors, config=config)
    local_registry.publish(directory, REF, signer, wide)
    verified = local_registry.verify(local_registry.resolve(REF), policy)
    cache = Cache(tmp_path / "cache")
    hand_off(local_registry, verified, cache, base=wide).close()
    times: Counter[bool] = Counter()
    for _ in range(7):
        for sealed in (True, False):
            started = time.perf_counter()
            hand_off(local_registry, verified, cache, base=wide, sealed=sealed).close()
            taken = time.perf_counter() - started
            times[sealed] = min(times[sealed] or taken, taken)
    print({"sealed_s": times[True], "in_place_s": times[False]})
    ratio = round(times[True] / times[False], 2)
    figure("64 MiB from the cache: sealed / in place", ratio, "<= 4", ratio <= 4)
