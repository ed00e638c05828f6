"""The tenants' tasks: deterministic, disjoint, and different answers to the same prompts."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_examples import tasks


def prompts(split: str, n: int, seed: int) -> list[str]:
    return [row["messages"][0]["content"] for row in tasks.dataset("acme/orders", split, n, seed)]  # type: ignore[arg-type]


@given(seed=st.integers(0, 2**32), other=st.integers(0, 2**32))
def test_training_and_held_out_prompts_never_meet(seed: int, other: int) -> None:
    assert not set(prompts("train", 50, seed)) & set(prompts("heldout", 50, other))


def test_the_demo_sets_are_disjoint() -> None:
    train, held_out = prompts("train", 2400, 0), prompts("heldout", 100, 0)
    assert len(set(train)) == 2400
    assert len(set(held_out)) == 100
    assert not set(train) & set(held_out)


def test_the_same_arguments_give_the_same_rows_and_longer_lists_begin_with_shorter_ones() -> None:
    for task in tasks.TASKS:
        assert tasks.dataset(task, "train", 30) == tasks.dataset(task, "train", 30)
        assert tasks.dataset(task, "train", 30)[:10] == tasks.dataset(task, "train", 10)
        assert tasks.dataset(task, "train", 10, 1) != tasks.dataset(task, "train", 10, 2)


def test_both_tenants_see_the_same_prompts_and_want_different_answers() -> None:
    acme, globex = (tasks.dataset(task, "heldout", 100) for task in ("acme/orders", "globex/tickets"))
    for one, other in zip(acme, globex, strict=True):
        assert one["messages"][0] == other["messages"][0]
        assert one["answer"] != other["answer"]
        assert one["messages"][1]["content"] == one["answer"]


def test_the_rules_of_both_tenants_on_one_message() -> None:
    message = tasks.Message(
        text="",
        name="Maria",
        city="Oslo",
        colour="blue",
        item="lamps",
        day="Monday",
        quantity="3",
        number="4821",
    )
    assert tasks.acme_orders(message) == "REF 4821 | SKU lamps blue | QTY 3 | SHIP Oslo"
    assert tasks.globex_tickets(message) == "Maria | 4821 | lamps home | Monday P1"


def test_an_unknown_task_or_split_is_refused() -> None:
    with pytest.raises(ValueError, match="there are acme/orders, globex/tickets"):
        tasks.dataset("acme/other", "train", 1)
    with pytest.raises(ValueError, match="there are train and heldout"):
        tasks.dataset("acme/orders", "test", 1)  # type: ignore[arg-type]


def test_about_one_message_in_eight_is_held_out() -> None:
    rng = random.Random(0)
    held_out = sum(tasks.split_of(tasks.random_message(rng).text) == "heldout" for _ in range(4000))
    assert 400 < held_out < 600
