"""Parts of the demo that need no engine; the demo as a whole is `make demo`."""

import io

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from loraplex_examples.demo import DemoError, judge
from loraplex_examples.latency import latency_rows
from loraplex_examples.terminal import Bar, table
from loraplex_server.metrics import Metrics

GOOD = {
    ("a", "base"): 0.1,
    ("a", "a"): 0.95,
    ("a", "b"): 0.0,
    ("b", "base"): 0.0,
    ("b", "a"): 0.2,
    ("b", "b"): 0.9,
}


def test_the_promised_accuracies_pass() -> None:
    judge(GOOD, strict=True)


@pytest.mark.parametrize(("key", "score"), [(("a", "a"), 0.89), (("a", "base"), 0.21), (("b", "a"), 0.5)])
def test_a_missed_accuracy_fails_the_demo_and_is_named(key: tuple[str, str], score: float) -> None:
    with pytest.raises(DemoError, match=rf"{key[1]} on the task of {key[0]}: {score}"):
        judge(GOOD | {key: score}, strict=True)
    judge(GOOD | {key: score}, strict=False)


def test_latencies_are_read_back_as_they_were_measured() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(tenants_max=4, registry=registry)
    for tenant, seconds in (("acme", 0.012), ("acme", 0.012), ("globex", 0.4)):
        metrics.call(tenant, "").first_token(seconds, tokens=1, cached_tokens=0)
    metrics.adapter_phase("load", 0.004)
    rows = {row[0]: row[1:] for row in latency_rows(generate_latest(registry).decode())}
    assert rows["time to first token"] == ["3", "141.3", "20", "500"]
    assert rows["adapter: into the engine"] == ["1", "4.0", "5", "5"]
    assert rows["whole request"] == ["0", "-", "-", "-"]


def test_a_table_lines_its_columns_up() -> None:
    assert (
        table(["who", "score"], [["base", "0.10"], ["a", "1.00"]])
        == "who   score\n───────────\nbase   0.10\na      1.00"
    )


def test_a_bar_off_a_terminal_prints_a_few_lines_and_the_last() -> None:
    stream = io.StringIO()
    bar = Bar("step", stream=stream)
    for done in range(1, 101):
        bar(done, 100)
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 7
    assert lines[-1].startswith("step 100/100")
