"""The arithmetic of `benchmarks.peers`: what is asked of whom, and which lines there are where a peer is absent."""

from typing import Any

import pytest

from benchmarks.peers import ADAPTERS, CASES, run_rounds, summarize_rates

SECONDS = {"ours": 1.0, "ours_nf4": 2.0, "peft": 10.0, "llamacpp": 8.0}


class Recorder:
    """A peer that takes the same time for every request."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.started: dict[str, Any] = {}
        self.requests: list[dict[str, Any]] = []
        self._name, self._log = name, log

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._log.append(self._name)
        self.requests.append(request)
        return {"seconds": SECONDS[self._name]}

    def close(self) -> None: ...


def ask(*names: str) -> tuple[dict[str, Recorder], dict[str, list[float]], list[str]]:
    log: list[str] = []
    peers = {name: Recorder(name, log) for name in names}
    return peers, run_rounds(peers, rounds=2, new_tokens=5), log


def test_ratios_are_of_tokens_per_second_and_only_the_real_shape_has_bars() -> None:
    _, rates, _ = ask(*SECONDS)
    found = {one.name: one for one in summarize_rates(rates, "")}
    assert found["ours_tok_s"].value == pytest.approx(ADAPTERS * 5 / 1.0)
    assert (found["vs_peft_mixed"].value, found["vs_peft_mixed"].target) == (10.0, 5.0)
    assert (found["vs_llamacpp_16"].value, found["vs_llamacpp_16"].target) == (4.0, 2.0)
    assert found["vs_peft_serial"].value == pytest.approx(80.0), "two rows in the time of sixteen"
    assert all(one.target is None and one.name.startswith("tiny_") for one in summarize_rates(rates, "tiny_"))


def test_every_row_of_the_compared_cases_has_its_own_adapter_and_another_peer_begins_each_round() -> None:
    peers, _, log = ask(*SECONDS)
    for peer in ("ours", "ours_nf4"):
        assert all(request["rows"] == tuple(range(ADAPTERS)) for request in peers[peer].requests)
    assert [request["serial"] for request in peers["peft"].requests if "serial" in request] == [True] * 3
    assert len({log[start] for start in range(0, len(log), len(CASES))}) > 1


def test_a_peer_that_is_absent_has_no_lines() -> None:
    _, rates, _ = ask("ours", "ours_nf4", "peft")
    names = {one.name for one in summarize_rates(rates, "")}
    assert not any("llamacpp" in name for name in names)
    assert {"vs_peft_mixed", "ours_nf4_tok_s"} <= names
