"""`loraplex demo`: the whole product on this machine, in a few minutes, with nothing prepared.

    base model ─▶ two tenants train ─▶ server starts ─▶ adapters are signed, pushed and swapped in while it runs
    ─▶ the same prompts through base, acme and globex ─▶ latency metrics ─▶ a tampered adapter is refused

Every part is the real one: the `loraplex` and `registry` commands in processes of their own, the client over
gRPC, the engine vLLM. What it leaves is in ~/.cache/loraplex/demo.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_client import AdapterRefusedError, ChatMessage, Client, LoraplexError, Sampling
from loraplex_examples import s3_server, tasks
from loraplex_examples.latency import latency_rows
from loraplex_examples.terminal import Bar, table
from loraplex_examples.tiny_base import ensure_tiny_base

TENANTS = ("acme", "globex")
ADAPTERS = {"acme": "acme/orders", "globex": "globex/tickets"}
BUCKET = "loraplex-demo"
TRAIN_ROWS = 2400
HELD_OUT = 100
OWN_AT_LEAST, OTHERS_AT_MOST = 0.90, 0.20
ANSWER = Sampling(temperature=0.0, max_tokens=48)
STREAMS = 16
START_TIMEOUT_S = 600.0
SETTINGS = """
base_model: {base}
method: qlora
output: {output}
data:
  - {{path: {data}, type: messages}}
lora: {{r: 16, alpha: 32}}
train: {{max_steps: 150, micro_batch: 16, lr: 4e-3, warmup: 0.1, seq_len: 256, seed: 1}}
"""


class DemoError(Exception):
    """A step did not do what it promises; the message says which and what to look at."""


@dataclass
class Demo:
    """Where things are, and what the steps found out."""

    root: Path
    base: Path
    registry: str
    environment: dict[str, str]
    api_keys: dict[str, str] = field(default_factory=dict)
    port: int = 0
    metrics_port: int = 0

    def run(self, *command: str) -> str:
        """Run one of our commands as a user would type it; gives what it printed."""
        print(f"  $ {' '.join(command)}".replace(str(self.root) + "/", ""))
        words = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
        ended = subprocess.run(
            words, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise DemoError(f"{command[0]} ended with status {ended.returncode}: {ended.stderr.strip()}")
        return ended.stdout.strip()

    def client(self, tenant: str) -> Client:
        """A client with a tenant's API key."""
        return Client(f"127.0.0.1:{self.port}", api_key=self.api_keys[tenant])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; exit status 0 when everything it shows is as promised, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="loraplex demo", description="Watch the whole product work.")
    parser.add_argument("--s3", action="store_true", help="keep the registry in a real S3 server on loopback")
    parser.add_argument(
        "--model", help="another base: a Hugging Face id or a directory (default: a tiny one, made here)"
    )
    options = parser.parse_args(arguments)
    # Before torch is loaded: where other programs run too, threads that spin while they wait slow each other down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with contextlib.ExitStack() as stack:
            show(stack, s3=options.s3, model=options.model)
    except (DemoError, LoraplexError) as error:
        print(f"\nloraplex demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def show(stack: contextlib.ExitStack, *, s3: bool, model: str | None) -> None:
    """All steps in order; the server and the S3 server end with the stack."""
    heading("1. One base model")
    base = find_base(model)
    demo = prepare(stack, base=base, s3=s3)
    heading("2. Two tenants train an adapter each (QLoRA on the base in NF4)")
    for tenant in TENANTS:
        train(demo, tenant)
    heading("3. One server, base in NF4, no adapter yet")
    stack.enter_context(serve(demo))
    heading("4. Signed, pushed and swapped in while it serves")
    push(demo)
    swap_in(demo)
    heading(f"5. {HELD_OUT} held-out prompts through base and both adapters")
    scores = compare(demo)
    heading("6. Latency, read back from /metrics")
    print(latency(demo))
    heading("7. A tampered adapter")
    tamper(demo)
    judge(scores, strict=model is None)


def heading(text: str) -> None:
    """Begin a step."""
    print(f"\n\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/loraplex, or ~/.cache/loraplex."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex"


def find_base(model: str | None) -> Path:
    """The base that was named, or the tiny one: trained now, or kept from an earlier time."""
    if model is not None:
        from loraplex_trainer.methods import model_directory

        return model_directory(model)
    bar = Bar("train the tiny base, step")
    base = ensure_tiny_base(cache_dir(), lambda step, steps, loss: bar(step, steps, f"loss {loss:.2f}"))
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"  {base.name}: {size / 1e6:.1f} MB in bf16")
    return base


def prepare(stack: contextlib.ExitStack, *, base: Path, s3: bool) -> Demo:
    """Make an empty place, signing keys, API keys, a trust policy, and a registry."""
    root = cache_dir() / "demo"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True, mode=0o700)
    environment = {**os.environ, "XDG_CONFIG_HOME": str(root / "config")}
    registry = (root / "registry").as_uri()
    if s3:
        if s3_server.executable() is None:
            raise DemoError("the S3 server is not installed; `make s3-setup` brings it")
        server = stack.enter_context(s3_server.running())
        os.environ.update(server.environment)
        environment.update(server.environment)
        registry = server.make_bucket(BUCKET) + "/registry"
        print(f"  S3 server on {server.endpoint_url}")
    demo = Demo(root=root, base=base, registry=registry, environment=environment)
    make_keys(demo)
    return demo


def make_keys(demo: Demo) -> None:
    """One signing key per tenant, trusted for that tenant alone; one API key per tenant."""
    from loraplex_server.identity.api_keys import make_key

    rules, entries = ['version = 1\ndefault = "deny"\n'], []
    for tenant in TENANTS:
        demo.run("registry", "keys", "gen", f"{tenant}.key", "--no-passphrase")
        rules.append(f'[[rules]]\nscope = "{tenant}/**"\nkeys = [{{ path = "{tenant}.pub" }}]\n')
        demo.api_keys[tenant], entry = make_key(f"{tenant}-app", tenant)
        entries.append(entry)
    (demo.root / "policy.toml").write_text("\n".join(rules))
    (demo.root / "keys.toml").write_text("\n".join(entries))


def train(demo: Demo, tenant: str) -> None:
    """Write a tenant's data and settings, and train."""
    from loraplex_trainer.cli import StepPrinter, quiet_libraries
    from loraplex_trainer.config import load_config
    from loraplex_trainer.recipe import train as run

    quiet_libraries()
    adapter = ADAPTERS[tenant]
    folder = demo.root / tenant
    folder.mkdir()
    rows = tasks.dataset(adapter, "train", TRAIN_ROWS)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = folder / "train.yaml"
    settings.write_text(
        SETTINGS.format(base=demo.base, output=adapter.rpartition("/")[2], data="train.jsonl").lstrip()
    )
    result = run(load_config(settings), StepPrinter(sys.stdout, label=adapter))
    print(f"  {result.adapter_bytes / 1e3:.0f} kB, loss {result.loss:.3f}, {result.seconds:.0f} s")


@contextlib.contextmanager
def serve(demo: Demo) -> Iterator[None]:
    """Run `loraplex serve` until the block ends."""
    demo.port, demo.metrics_port = free_port(), free_port()
    (demo.root / "server.toml").write_text(
        f"""[server]
listen = "127.0.0.1:{demo.port}"
metrics_listen = "127.0.0.1:{demo.metrics_port}"
[model]
path = "{demo.base}"
quantization = "nf4"
context_tokens = 256
batch_requests = {STREAMS}
eager = true
[adapters]
slots = 4
rank_max = 16
cache_dir = "cache"
[registry]
url = "{demo.registry}"
policy = "policy.toml"
tag_ttl_s = 0.5
[auth]
keys = "keys.toml"
"""
    )
    log = demo.root / "server.log"
    command = [str(Path(sys.executable).with_name("loraplex")), "serve", "--config", "server.toml"]
    print("  $ loraplex serve --config server.toml")
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=demo.root, env=demo.environment, stdout=output, stderr=output)
        try:
            wait_until_ready(demo, process, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def wait_until_ready(demo: Demo, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Show a bar until the server's health is SERVING."""
    bar, started, seconds = Bar("  load the base into vLLM, second"), time.monotonic(), 0
    with demo.client("acme") as client:
        while not client.is_ready(timeout_s=1.0):
            if process.poll() is not None or seconds > START_TIMEOUT_S:
                tail = "\n".join(log.read_text().splitlines()[-15:])
                raise DemoError(f"the server did not come up; {log} ends with\n{tail}")
            time.sleep(0.2)
            seconds = int(time.monotonic() - started)
            bar(min(seconds, 59), 60)
    bar(60, 60, "ready,")


def push(demo: Demo) -> None:
    """Publish both adapters, and one of them a second time."""
    for tenant, adapter in ADAPTERS.items():
        folder = f"{tenant}/{adapter.rpartition('/')[2]}"
        command = ("registry", "push", folder, adapter, "--tag", "prod", "--key", f"{tenant}.key")
        print("  " + demo.run(*command, "--registry", demo.registry).replace("\n", "\n  "))
    print("  " + demo.run(*command, "--registry", demo.registry).replace("\n", "\n  "))


def swap_in(demo: Demo) -> None:
    """Bring both adapters in while a stream of the base model goes on, and show each step."""
    endless = Sampling(temperature=0.0, max_tokens=200, ignore_eos=True)
    prompt = [ChatMessage("user", "Copy: red lamps")]
    with demo.client("acme") as client, client.stream(prompt, sampling=endless) as stream:
        pieces = iter(stream)
        next(pieces)
        for tenant, adapter in ADAPTERS.items():
            with demo.client(tenant) as own:
                steps = list(own.load_adapter(f"{adapter}@prod"))
            phases = dict.fromkeys(step.phase for step in steps)
            print(f"  {adapter}@prod: {' → '.join(phases)} in {steps[-1].elapsed_s * 1000:.0f} ms")
        for _ in pieces:
            pass
        print(f"  meanwhile a stream of the base got its {stream.completion.usage.completion_tokens} tokens")
    with demo.client("globex") as intruder:
        try:
            intruder.generate(prompt, adapter="acme/orders@prod")
        except LoraplexError as error:
            print(f"  globex's API key asks for acme/orders: {error.code}")
        else:
            raise DemoError("globex's key was let at acme's adapter")


def compare(demo: Demo) -> dict[tuple[str, str], float]:
    """Answer the same prompts with base and adapters; gives accuracy by (task, who answered)."""
    rows = {task: tasks.dataset(task, "heldout", HELD_OUT) for task in ADAPTERS.values()}
    prompts = [row["messages"][0]["content"] for row in rows["acme/orders"]]
    who = {"base": ("acme", ""), **{a: (t, f"{a}@prod") for t, a in ADAPTERS.items()}}
    answers = ask_all(demo, prompts, who)
    print(f"\n  {prompts[0]}")
    for name, given in answers.items():
        print(f"    {name:<16} {given[0]}")
    scores = {
        (task, name): sum(a == row["answer"] for a, row in zip(given, rows[task], strict=True)) / HELD_OUT
        for task in rows
        for name, given in answers.items()
    }
    body = [[f"task of {task}", *(f"{scores[task, name]:.2f}" for name in answers)] for task in rows]
    print("\n" + table(["exact match", *answers], body))
    return scores


def ask_all(demo: Demo, prompts: list[str], who: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Send every prompt to everybody, mixed, `STREAMS` at a time."""
    bar = Bar("  answer")
    jobs = [(name, prompt) for prompt in prompts for name in who]
    with contextlib.ExitStack() as stack:
        clients = {tenant: stack.enter_context(demo.client(tenant)) for tenant in TENANTS}

        def ask(job: tuple[str, str]) -> str:
            tenant, adapter = who[job[0]]
            turns = [ChatMessage("user", job[1])]
            return clients[tenant].generate(turns, adapter=adapter, sampling=ANSWER).text.strip()

        answers: dict[str, list[str]] = {name: [] for name in who}
        with ThreadPoolExecutor(STREAMS) as threads:
            for done, (job, answer) in enumerate(zip(jobs, threads.map(ask, jobs), strict=True), 1):
                answers[job[0]].append(answer)
                bar(done, len(jobs))
    return answers


def latency(demo: Demo) -> str:
    """Read the latency histograms from the metrics page."""
    url = f"http://127.0.0.1:{demo.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        page = reply.read().decode()
    return table(["milliseconds", "count", "mean", "p50 ≤", "p99 ≤"], latency_rows(page))


def tamper(demo: Demo) -> None:
    """Publish a third adapter, change one bit of it in the store, and call it."""
    folder = "acme/orders"
    demo.run("registry", "push", folder, "acme/tampered", "--key", "acme.key", "--registry", demo.registry)
    where = flip_one_bit(demo, "acme", "tampered")
    print(f"  one bit flipped in {where}")
    with demo.client("acme") as client:
        try:
            client.generate([ChatMessage("user", "x")], adapter="acme/tampered")
        except AdapterRefusedError as error:
            print(f"  refused: {error} [{error.code}]")
        else:
            raise DemoError("a tampered adapter was served")
        done = client.generate([ChatMessage("user", "x")], adapter="acme/orders@prod", sampling=ANSWER)
        print(f"  acme/orders@prod still answers ({done.usage.completion_tokens} tokens)")


def flip_one_bit(demo: Demo, tenant: str, adapter: str) -> str:
    """Change the stored weights behind the registry's back; gives the object's name."""
    prefix = f"t/{tenant}/a/{adapter}/b/"
    if demo.registry.startswith("file:"):
        blob = next(path for path in (demo.root / "registry" / prefix).rglob("*") if path.is_file())
        body = bytearray(blob.read_bytes())
        body[len(body) // 2] ^= 1
        blob.chmod(0o600)
        blob.write_bytes(body)
        return str(blob.relative_to(demo.root))
    import boto3

    objects = boto3.client("s3")
    found = objects.list_objects_v2(Bucket=BUCKET, Prefix=f"registry/{prefix}")
    key = found["Contents"][0]["Key"]
    body = bytearray(objects.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    objects.put_object(Bucket=BUCKET, Key=key, Body=bytes(body))
    return f"s3://{BUCKET}/{key}"


def judge(scores: dict[tuple[str, str], float], *, strict: bool) -> None:
    """Compare the table with the promise.

    Raises:
        DemoError: an adapter does not know its task, or somebody else does (with the tiny base only: what
            another base knows or needs to learn is not known here).
    """
    is_own: Callable[[tuple[str, str]], bool] = lambda key: key[0] == key[1]  # noqa: E731
    wrong = [
        f"{name} on the task of {task}: {score:.2f}"
        for (task, name), score in scores.items()
        if (score < OWN_AT_LEAST if is_own((task, name)) else score > OTHERS_AT_MOST)
    ]
    if wrong and strict:
        raise DemoError(f"expected own ≥ {OWN_AT_LEAST}, others ≤ {OTHERS_AT_MOST}; got {'; '.join(wrong)}")
    print("\nEverything above ran on this machine, base model in memory once. Next: README.md, docs/.")


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
