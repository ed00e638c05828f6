"""Hostile adapters: directories made by hand, and generators of headers and settings. Everything is seeded.

`Watch` is the judge: while it is on, the process may open no file outside one directory, run no program, import no
module and use no socket; it measures the time of each case and the growth of the process.
"""

import contextlib
import gc
import json
import os
import random
import resource
import socket
import stat
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from loraplex_registry.errors import BaseMismatchError, RankTooLargeError, UnsupportedAdapterError
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import Limits, validate_adapter
from tests.registry import builders

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DECLARED = (UnsupportedAdapterError, RankTooLargeError, BaseMismatchError)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
SIZE = 4 * builders.HIDDEN * 4
SECONDS_MAX = 1.0
GROWTH_MAX = 64 << 20


def framed(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, an object or raw bytes."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(body).to_bytes(8, "little") + body + data


def tensor(begin: int, end: int, shape: list[Any], dtype: str = "F32", **more: object) -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def pair(**more: Any) -> dict[str, Any]:
    """The header of one right pair."""
    return {A: tensor(0, SIZE, [4, 16]), B: tensor(SIZE, 2 * SIZE, [16, 4]), **more}


DATA = bytes(2 * SIZE)


def good_weights() -> bytes:
    """The weights file of a good adapter."""
    return save(builders.adapter_tensors())


def _config(**changes: object) -> Callable[[Path], None]:
    return lambda place: _text(place, json.dumps(builders.adapter_config(**changes)))


def _text(place: Path, text: str) -> None:
    (place / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))


def _raw(text: str) -> Callable[[Path], None]:
    return lambda place: _text(place, text)


def _weights(body: bytes) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        (place / WEIGHTS).write_bytes(body)

    return spoil


def _extra(name: str, body: bytes = b"x") -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        descriptor = os.open(os.fsencode(str(place) + "/" + name), os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(descriptor, body)
        os.close(descriptor)

    return spoil


def _zip_tail(place: Path) -> None:
    with zipfile.ZipFile(place / WEIGHTS, "a") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'true'\ntR.")


def _zip_only(place: Path) -> None:
    with zipfile.ZipFile(place / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")


def _bin_only(place: Path) -> None:
    (place / WEIGHTS).rename(place / "adapter_model.bin")


def _symlink(place: Path) -> None:
    (place / WEIGHTS).unlink()
    (place / WEIGHTS).symlink_to("/etc/passwd")


def _symlink_config(place: Path) -> None:
    (place / CONFIG).rename(place.parent / "outside.json")
    (place / CONFIG).symlink_to("../outside.json")


def _hardlink(place: Path) -> None:
    os.link(place / WEIGHTS, place.parent / f"twin-{place.name}")


def _fifo(place: Path) -> None:
    (place / WEIGHTS).unlink()
    os.mkfifo(place / WEIGHTS)


def _socket(place: Path) -> None:
    (place / CONFIG).unlink()
    with socket.socket(socket.AF_UNIX) as server, _inside(place):
        server.bind(CONFIG)


@contextlib.contextmanager
def _inside(place: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def _device(place: Path) -> None:
    (place / WEIGHTS).unlink()
    try:
        os.mknod(place / WEIGHTS, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    except PermissionError:  # only root makes devices; a directory is refused by the same rule
        (place / WEIGHTS).mkdir()


def _directory(place: Path) -> None:
    (place / CONFIG).unlink()
    (place / CONFIG).mkdir()


def _subdirectory(place: Path) -> None:
    (place / "README.md").mkdir()


def _crowd(place: Path) -> None:
    for number in range(200):
        (place / f"file{number}").touch()


def _sparse(place: Path) -> None:
    with (place / WEIGHTS).open("wb") as file:
        file.write((1 << 19).to_bytes(8, "little"))
        file.truncate(8 << 40)


def _no_config(place: Path) -> None:
    (place / CONFIG).unlink()


def _empty(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes(b"") and None


def _not_finite(place: Path) -> None:
    tensors = builders.adapter_tensors()
    tensors[A][0, 0] = float("nan")
    (place / WEIGHTS).write_bytes(save(tensors))


def _deep(depth: int) -> str:
    return "[" * depth + "]" * depth


CASES: dict[str, Callable[[Path], object]] = {
    # files
    "bin only": _bin_only,
    "bin beside": _extra("adapter_model.bin", b"\x80\x04."),
    "pt beside": _extra("adapter_model.pt"),
    "code beside": _extra("modeling.py"),
    "library beside": _extra("lib.so"),
    "tokenizer beside": _extra("tokenizer.json", b"{}"),
    "embeddings beside": _extra("new_embeddings.safetensors"),
    "hidden file": _extra(".adapter_config.json"),
    "polyglot zip tail": _zip_tail,
    "zip named safetensors": _zip_only,
    "pickle named safetensors": _weights(b"\x80\x04\x95cos\nsystem\n(S'true'\ntR."),
    "gguf named safetensors": _weights(b"GGUF" + bytes(60)),
    "symlink out": _symlink,
    "symlinked settings": _symlink_config,
    "hard link": _hardlink,
    "pipe": _fifo,
    "socket": _socket,
    "device": _device,
    "directory for a file": _directory,
    "sub-directory": _subdirectory,
    "two hundred files": _crowd,
    "name with dots": _extra("..adapter_config.json"),
    "name of backslashes": _extra("..\\..\\x"),
    "name with control bytes": _extra("a\x1b[2J\n"),
    "name that is not UTF-8": _extra(os.fsdecode(b"\xff\xfe")),
    "unicode twin": _extra("\u0430dapter_config.json"),
    "full-width twin": _extra("\uff41dapter_config.json"),
    "case twin": _extra("Adapter_Config.json", b"{}"),
    "reserved name": _extra("CON"),
    "very long name": _extra("a" * 255),
    "empty weights": _empty(WEIGHTS),
    "empty settings": _empty(CONFIG),
    "no settings": _no_config,
    "sparse eight tebibytes": _sparse,
    # headers
    "header longer than any file": _weights(struct.pack("<Q", 1 << 60) + bytes(64)),
    "header of 100 MB said": _weights(struct.pack("<Q", 100 << 20) + bytes(64)),
    "header of 1 MiB of spaces": _weights(framed(b"{" + b" " * ((1 << 20) - 2) + b"}")),
    "header of small lists": _weights(framed(b'{"a":[' + b"[]," * 340_000 + b"[]]}")),
    "header of small objects": _weights(framed(b'{"a":[' + b"{}," * 340_000 + b"{}]}")),
    "header nested deep": _weights(framed(b'{"a":' + _deep(400_000).encode() + b"}")),
    "duplicate tensor": _weights(
        framed(("{" + ",".join([json.dumps({A: tensor(0, SIZE, [4, 16])})[1:-1]] * 2) + "}").encode(), DATA)
    ),
    "tensors overlap": _weights(
        framed({A: tensor(0, SIZE, [4, 16]), B: tensor(0, SIZE, [16, 4])}, DATA[:SIZE])
    ),
    "hole between tensors": _weights(
        framed({A: tensor(0, SIZE, [4, 16]), B: tensor(SIZE + 8, 2 * SIZE + 8, [16, 4])}, DATA + bytes(8))
    ),
    "bytes behind the tensors": _weights(framed(pair(), DATA + b"PK\x05\x06")),
    "shape overflows": _weights(
        framed({A: tensor(0, SIZE, [1 << 40, 1 << 40]), B: tensor(SIZE, 2 * SIZE, [16, 4])}, DATA)
    ),
    "shape of 100,000 ones": _weights(framed({A: tensor(0, 4, [1] * 100_000)}, bytes(4))),
    "twenty thousand empty tensors": _weights(framed({f"t{i}": tensor(0, 0, [0, 4]) for i in range(14_000)})),
    "tensor that climbs": _weights(
        framed(pair(**{"../../x": tensor(2 * SIZE, 2 * SIZE + 4, [1])}), DATA + bytes(4))
    ),
    "tensor name of half a megabyte": _weights(framed({"a" * 500_000: tensor(0, 4, [1], "X")}, bytes(4))),
    "number of 4,000 digits": _weights(
        framed(json.dumps({A: tensor(0, SIZE, [4, 16])}).replace("16", "1" * 4000).encode())
    ),
    "NaN in the header": _weights(
        framed(json.dumps({A: tensor(0, SIZE, [float("nan"), 16])}).encode(), DATA)
    ),
    "metadata of 100 kB": _weights(framed(pair(__metadata__={"a": "x" * 100_000}), DATA)),
    "metadata nested": _weights(framed(pair(__metadata__={"a": {"b": "c"}}), DATA)),
    "unknown key of a tensor": _weights(
        framed({A: tensor(0, SIZE, [4, 16], loader="os.system"), B: tensor(SIZE, 2 * SIZE, [16, 4])}, DATA)
    ),
    "weights with NaN": _not_finite,
    "header that is not UTF-8": _weights(framed(b'{"\xff":1}')),
    "header with a byte order mark": _weights(framed(b"\xef\xbb\xbf{}")),
    # settings
    "settings nested deep": _raw(_deep(30_000)),
    "settings of 65 KiB": _raw(json.dumps({"a": "x" * (65 << 10)})),
    "duplicate r": _raw(json.dumps(builders.adapter_config())[:-1] + ',"r":100000}'),
    "alpha NaN": _raw(json.dumps(builders.adapter_config(lora_alpha=float("nan")))),
    "alpha of 400 digits": _config(lora_alpha=10**399),
    "alpha 1e999": _raw(
        json.dumps(builders.adapter_config()).replace('"lora_alpha": 8', '"lora_alpha": 1e999')
    ),
    "rank a million": _config(r=1_000_000),
    "rank of 4,000 digits": _raw(
        json.dumps(builders.adapter_config()).replace('"r": 4', '"r": ' + "4" * 4000)
    ),
    "rank hidden in a pattern": _config(rank_pattern={"layers.0.self_attn.q_proj": 1_000_000}),
    "regular expression that explodes": _config(target_modules="(a+)+$"),
    "four thousand rank patterns": _config(rank_pattern={f"a{i}": 4 for i in range(4000)}),
    "auto_mapping": _config(auto_mapping={"base_model_class": "X", "parent_library": "os"}),
    "auto_map": _config(auto_map={"AutoModel": "evil--repo.Model"}),
    "trust_remote_code": _config(trust_remote_code=True),
    "custom code": _config(custom_module="x"),
    "address in a dropped setting": _config(eva_config={"from": "http://169.254.169.254/"}),
    "path in a dropped setting": _config(exclude_modules="/proc/self/mem"),
    "layer replication": _config(layer_replication=[[0, 1_000_000]]),
    "whole layers": _config(modules_to_save=["lm_head"]),
    "unknown setting": _config(vllm_lora_scaling_factor=1e9),
    "lone surrogate": _raw(json.dumps(builders.adapter_config(task_type="\ud800"))),
    "settings in UTF-16": lambda place: (place / CONFIG).write_bytes(json.dumps({"r": 4}).encode("utf-16")),
    "settings are a list": _raw("[]"),
}
"""Spoils a good adapter directory, each in its own way."""


class Watch:
    """Forbids what a validator never needs, and measures. The hook stays installed, as audit hooks do, but sleeps."""

    _installed: "Watch | None" = None

    def __init__(self) -> None:
        self._allowed: str | None = None
        self.broken: list[str] = []

    @classmethod
    def get(cls) -> "Watch":
        """The one watch of this process; audit hooks cannot be removed."""
        if cls._installed is None:
            cls._installed = cls()
            sys.addaudithook(cls._installed._hook)
        return cls._installed

    @contextlib.contextmanager
    def only(self, place: Path) -> Iterator[None]:
        """Allow nothing but reading below `place`."""
        self._allowed = str(place)
        try:
            yield
        finally:
            self._allowed = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        allowed = self._allowed
        if allowed is None:
            return
        if event in ("open", "os.listdir", "os.scandir"):
            path = arguments[0]
            inside = isinstance(path, int) or Path(os.path.abspath(os.fsdecode(path))).is_relative_to(allowed)
            writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not inside or writes:
                self.broken.append(f"{event} {path!r}")
        elif event in (
            "exec",
            "compile",
            "import",
            "ctypes.dlopen",
            "marshal.loads",
            "pickle.find_class",
        ) or (
            event.startswith(
                ("subprocess.", "socket.", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "shutil.")
            )
        ):
            self.broken.append(f"{event} {arguments!r:.100}")


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Largest resident memory of this process since `reset_peak`, or since it began."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def reset_peak() -> int:
    """Forget the peak so far (proc(5), clear_refs) and return the resident memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return rss_bytes()


CLOCK = time.process_time
"""What a verdict's second is measured by: in `make test` processor time, since a busy machine is not the adapter's
fault; the campaign sets the clock on the wall.
"""


def judge(place: Path, base: BaseModel, *, limits: Limits | None = None) -> str:
    """Validate under watch and return the declared verdict; anything else is raised.

    Raises:
        AssertionError: an undeclared error, something forbidden, or too slow.
    """
    watch = Watch.get()
    watch.broken.clear()
    started = CLOCK()
    verdict, message = "accepted", ""
    try:
        with watch.only(place):
            validate_adapter(place, base, limits)
    except DECLARED as error:
        verdict, message = error.code, error.message
    seconds = CLOCK() - started
    assert not watch.broken, watch.broken
    assert seconds < SECONDS_MAX, f"{seconds:.2f} s"
    assert len(message) < 2000, f"a message of {len(message)} characters"
    assert message.isprintable(), ascii(message)
    return verdict


def warm_up(place: Path, base: BaseModel) -> None:
    """Judge a good adapter first, so that what is imported once is there."""
    gc.collect()
    gc.freeze()  # what other tests left must not be looked through again and again while a header is read
    directory = builders.make_adapter(place / "warm")
    validate_adapter(directory, base)
    assert judge(directory, base) == "accepted"


def generated_campaign(place: Path, base: BaseModel, *, cases: int, seed: int) -> Counter[str]:
    """Judge generated headers and settings; returns verdicts, with the growth of the process in bytes."""
    rng, found = random.Random(seed), Counter()
    warm_up(place, base)
    directory = builders.make_adapter(place / "generated")
    good_header = json.loads(good_weights()[8 : 8 + int.from_bytes(good_weights()[:8], "little")])
    data = good_weights()[8 + int.from_bytes(good_weights()[:8], "little") :]
    good_config = (directory / CONFIG).read_bytes()
    before = reset_peak()
    for number in range(cases):
        if number % 2:
            (directory / CONFIG).write_bytes(mutated_config(rng))
            (directory / WEIGHTS).write_bytes(
                good_weights() if number % 64 == 1 else framed(good_header, data)
            )
        else:
            (directory / CONFIG).write_bytes(good_config)
            (directory / WEIGHTS).write_bytes(mutated_weights(rng, good_header, data))
        try:
            found[judge(directory, base)] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}: {error!r}") from error
    found["growth"] = max(0, peak_bytes() - before)
    return found


ODD_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        4,
        1.5,
        1e308,
        2**31,
        2**63,
        2**64,
        10**30,
        10**400,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "../../x",
        "/etc/passwd",
        "http://x/",
        "\x00",
        "\ud800",
        "é",
        "a" * 3000,
        "F64",
        "BF16",
        "none",
        "LORA",
    ),
    *(
        [],
        {},
        [[]],
        [0],
        [0, 0],
        [1 << 50, 1],
        ["q_proj"],
        {"q_proj": 4},
        {"a": {"b": [1]}},
        [None],
        [True, False],
    ),
]


def odd(rng: random.Random, depth: int = 0) -> Any:
    """A value that does not belong there."""
    kind = rng.random()
    if kind < 0.75 or depth > 3:
        return rng.choice(ODD_VALUES)
    if kind < 0.85:
        return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.95:
        return {str(odd(rng, 4))[:20]: odd(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.randrange(-(1 << 70), 1 << 70)


def mutated_config(rng: random.Random) -> bytes:
    """Settings with keys changed, added, dropped or doubled, then perhaps bytes changed."""
    from tests.registry.test_weights import PEFT_CONFIG

    config: dict[str, Any] = dict(PEFT_CONFIG if rng.random() < 0.5 else builders.adapter_config())
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(list(config)) if config else "r"
        what = rng.random()
        if what < 0.6:
            config[key] = odd(rng)
        elif what < 0.8:
            config.pop(key, None)
        else:
            config[str(odd(rng))[:40]] = odd(rng)
    body = json.dumps(config).encode()
    if rng.random() < 0.1:
        body = body[:-1] + b"," + json.dumps({rng.choice(list(PEFT_CONFIG)): odd(rng)}).encode()[1:]
    return mutated_bytes(rng, body) if rng.random() < 0.3 else body


def mutated_weights(rng: random.Random, good: dict[str, Any], data: bytes) -> bytes:
    """A weights file with its header's structure, its length field, its bytes or its data changed."""
    header = json.loads(json.dumps(good))
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(header)) if header else "x"
        what = rng.random()
        if what < 0.4 and isinstance(header.get(name), dict):
            header[name][rng.choice(["dtype", "shape", "data_offsets", "more"])] = odd(rng)
        elif what < 0.5:
            header[name] = odd(rng)
        elif what < 0.65:
            header[str(odd(rng))[:2000]] = header.pop(name, None)
        elif what < 0.8:
            header.pop(name, None)
        elif what < 0.9:
            header["__metadata__"] = odd(rng)
        else:
            other = rng.choice(list(header)) if header else "x"
            header[name], header[other] = header.get(other), header.get(name)
    body = json.dumps(header).encode()
    if rng.random() < 0.3:
        body = mutated_bytes(rng, body)
    file = framed(body, data[: rng.choice([len(data), len(data), len(data), 0, rng.randrange(len(data))])])
    if rng.random() < 0.2:
        file = (
            rng.choice([rng.randrange(1 << 12), rng.getrandbits(64), len(body) + 1]).to_bytes(8, "little")
            + file[8:]
        )
    return mutated_bytes(rng, file) if rng.random() < 0.2 else file


def mutated_bytes(rng: random.Random, body: bytes) -> bytes:
    """Some bytes flipped, cut out, doubled, or all of them noise."""
    result = bytearray(body)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(result) + 1)
        what = rng.random()
        if what < 0.5 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif what < 0.7:
            del result[at : at + rng.randrange(1, 40)]
        elif what < 0.9:
            result[at:at] = rng.choice(
                [b"[" * 2000, b"\x00", b'"', b"{", b"}", b",", b"\xff", b"1" * 5000, b"\\ud800"]
            )
        else:
            return rng.randbytes(rng.randrange(200))
    return bytes(result)
