"""What the benchmarks make of what they measured: names, bars, the table and the profile. No engine starts here."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks import report
from benchmarks.lora_overhead import RATIOS, as_nf4, make_cases, make_compile_cases, summarize_rates
from benchmarks.models import SHAPES, ensure_adapters, linked_copies
from benchmarks.step_profile import KINDS, PYTHON, step_times
from benchmarks.table import as_markdown, make_rows

BARS = {
    "idle_ratio": 0.97,
    "mixed8_qv_r8_ratio": 0.94,
    "one_r16_all_ratio": 0.92,
    "mixed16_r16_all_ratio": 0.82,
    "mixed16_vs_stock": 3.2,
    "prefill_ratio": 0.92,
}


def rates() -> dict[str, list[float]]:
    """Rates of two rounds; what is measured once is there once."""
    cases = {case.name: case for case in make_cases(32) + make_compile_cases(32)}
    return {name: [100.0, 110.0][: case.rounds] for name, case in cases.items()} | {"base": [200.0, 220.0]}


def test_the_bars_of_lora_overhead_are_printed_by_their_names() -> None:
    found = {one.name: one for one in summarize_rates(rates())}
    assert {name: found[name].target for name in BARS} == BARS
    assert found["idle_ratio"].value == 0.5
    assert found["mixed16_vs_stock"].value == 1.0


def test_every_ratio_is_made_of_cases_that_are_measured() -> None:
    names = {case.name for case in make_cases(32) + make_compile_cases(32)}
    assert {name for _, above, below, _ in RATIOS for name in (above, below)} <= names


def test_nf4_is_held_against_the_bf16_ratios_of_the_same_run() -> None:
    bf16 = summarize_rates(rates())
    found = {one.name: one for one in as_nf4(bf16, bf16)}
    assert {name for name, one in found.items() if one.target is not None} == {f"nf4_{name}" for name in BARS}
    assert found["nf4_idle_ratio"].target == 0.47
    assert all(one.target is None for one in as_nf4(bf16, []))


def a_result(name: str, value: float, target: float | None) -> dict[str, object]:
    measurement = {"name": name, "value": value, "unit": "ratio", "target": target, "n": 5, "spread": 0.01}
    machine = {
        "cpu": "a processor",
        "cores": 2,
        "instructions": ["avx2"],
        "memory_gib": 8,
        "load_1m": 0.5,
        "python": "3",
    }
    return {
        "benchmark": "a_benchmark",
        "date": "2026-11-21T00:00Z",
        "commit": "abc",
        "machine": machine,
        "versions": {"torch": "2"},
        "measurements": [measurement],
    }


@pytest.mark.parametrize(
    ("name", "value", "target", "met"),
    [
        ("idle_ratio", 0.98, 0.97, True),
        ("nf4_idle_ratio", 0.93, 0.94, False),
        ("cpu100_bytes_ratio", 1.05, 1.1, True),
        ("itl_p99_ratio", 1.2, 1.1, False),
        ("stock_idle_ratio", 0.5, None, None),
    ],
)
def test_a_bar_is_met_on_its_better_side(
    name: str, value: float, target: float | None, met: bool | None
) -> None:
    (row,) = make_rows(a_result(name, value, target))
    assert row.met is met


@pytest.mark.parametrize(
    ("at_least", "names"),
    [
        (True, {*BARS, "ws4_ratio", "vs_peft_mixed", "vs_llamacpp_16"}),
        (False, {"itl_p99_ratio", "cold_minus_warm_ttft_ms", "cpu100_bytes_ratio"}),
    ],
)
def test_every_bar_of_adapters_has_its_better_side(at_least: bool, names: set[str]) -> None:
    for name in names:
        (row,) = make_rows(a_result(name, 2, 1))
        assert row.met is at_least, name


def test_a_commit_is_marked_where_code_differs_from_it_and_not_for_figures_or_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name in ("code.py", "page.md", "benchmarks/results/old.json"):
        (tmp_path / name).write_text("before")
    git("init", "-q"), git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    monkeypatch.setattr(report, "RESULTS", results)
    for name in ("page.md", "benchmarks/results/old.json", "benchmarks/results/new.json"):
        (tmp_path / name).write_text("after")
    clean = report._commit()
    assert clean
    assert "dirty" not in clean
    (tmp_path / "code.py").write_text("after")
    assert report._commit() == f"{clean}-dirty"


def test_the_table_shows_the_run_before_with_its_own_mark() -> None:
    result = a_result("idle_ratio", 0.98, 0.97) | {"before": a_result("idle_ratio", 0.96, 0.97)}
    page = as_markdown([result])
    assert "1 of 1 bars met." in page
    assert "| a_benchmark | idle_ratio | 0.98 (0.01) | ratio | >= 0.97 | yes | 0.96 no |" in page


def test_the_parts_of_a_profiled_step_add_up_to_it() -> None:
    def event(name: str, begin: float, duration: float) -> dict[str, object]:
        return {"ph": "X", "tid": 1, "name": name, "ts": 1000 * begin, "dur": 1000 * duration}

    events = [
        event("execute_context_1(16)_generation_0(0)", 0, 50),  # a prefill is no step
        event("execute_context_0(0)_generation_16(16)", 100, 80),
        event("gpu_model_runner: forward", 101, 60),
        event("## Call CompiledFxGraph None ##", 102, 58),
        event("_C::onednn_mm", 103, 20),
        event("loraplex::add_lora", 123, 5),
        event("aten::copy_", 130, 1),
        event("vllm::unified_attention_with_output", 135, 4),
        event("_C::cpu_attention_with_kv_cache", 136, 2),
        event("gpu_model_runner: postprocess", 161, 18),
        event("_C::onednn_mm", 162, 15),
        event("gpu_model_runner: sample", 181, 3),
        event("_C::greedy_argmax", 182, 1),
        event("execute_context_0(0)_generation_16(16)", 190, 80),
    ]
    (step,) = step_times({"traceEvents": events})
    expected = {
        "linear": 20,
        "lora": 5,
        "attention": 4,
        "norm, rotary, activation": 28,
        "logits": 15,
        "sampling": 1,
        "other operators": 1,
        PYTHON: 16,
    }
    assert step == pytest.approx(Counter(expected))
    assert set(step) <= {*KINDS, PYTHON}
    assert step.total() == pytest.approx(90)


def test_adapters_touch_what_they_are_asked_to_and_copies_are_the_same_files(tmp_path: Path) -> None:
    (adapter,) = ensure_adapters(SHAPES["tiny"], tmp_path, count=1, rank=8, modules=("q_proj", "v_proj"))
    header = load_file(adapter / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in header} == {"q_proj", "v_proj"}
    assert {weight.size(0) for name, weight in header.items() if "lora_A" in name} == {8}
    copies = linked_copies([adapter], tmp_path, 3)
    assert len({copy / "adapter_model.safetensors" for copy in copies}) == 3
    assert len({(copy / "adapter_model.safetensors").stat().st_ino for copy in copies}) == 1
