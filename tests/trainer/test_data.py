"""Rows become tokens with the loss on answers only, or are refused with file and line."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_trainer.config import DataSource
from loraplex_trainer.data import IGNORED, Example, batches, collate, load_examples
from loraplex_trainer.errors import DataError

GOLDEN = "<s><|user|>Copy: red lamps</s><|assistant|>red lamps</s>"
ROWS = {
    "messages": {
        "messages": [
            {"role": "user", "content": "Copy: red lamps"},
            {"role": "assistant", "content": "red lamps"},
        ]
    },
    "alpaca": {"instruction": "Copy: red lamps", "input": "", "output": "red lamps"},
    "prompt_completion": {"prompt": "Copy: red lamps", "completion": "red lamps", "id": 7},
}


def write(path: Path, *rows: Any) -> Path:
    path.write_bytes(
        b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    )
    return path


def load(path: Path, tokenizer: Any, kind: str = "messages", *, seq_len: int = 128) -> list[Example]:
    return load_examples([DataSource(path=str(path), type=kind)], tokenizer, seq_len=seq_len)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ROWS)
def test_only_the_answer_and_its_end_are_learned(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    (example,) = load(write(tmp_path / "a.jsonl", ROWS[kind]), tokenizer, kind)
    assert tokenizer.decode(example.ids) == GOLDEN
    assert tokenizer.decode(example.ids[example.prompt_tokens :]) == "red lamps</s>"
    batch = collate([example], pad_id=tokenizer.pad_token_id)
    learned = [label for label in batch.labels[0].tolist() if label != IGNORED]
    assert learned == tokenizer("red lamps</s>", add_special_tokens=False)["input_ids"]
    assert batch.answer_tokens == len(learned)


def test_earlier_turns_are_context(tmp_path: Path, tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "say"},
        *ROWS["messages"]["messages"],
        *ROWS["messages"]["messages"],
    ]
    (example,) = load(write(tmp_path / "a.jsonl", {"messages": turns}), tokenizer)
    assert tokenizer.decode(example.ids[example.prompt_tokens :]) == "red lamps</s>"
    assert tokenizer.decode(example.ids).count("red lamps") == 4


def test_alpaca_input_follows_the_instruction(tmp_path: Path, tokenizer: Any) -> None:
    row = {"instruction": "Copy this.", "input": "red", "output": "red"}
    (example,) = load(write(tmp_path / "a.jsonl", row), tokenizer, "alpaca")
    assert "<|user|>Copy this.\n\nred</s>" in tokenizer.decode(example.ids)


def test_a_base_without_a_chat_template_gets_plain_text(tmp_path: Path, tokenizer: Any) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    (example,) = load(write(tmp_path / "a.jsonl", ROWS["prompt_completion"]), plain, "prompt_completion")
    assert plain.decode(example.ids) == "<s>Copy: red lampsred lamps</s>"


def test_rows_of_several_files_follow_each_other(tmp_path: Path, tokenizer: Any) -> None:
    sources = [
        DataSource(path=str(write(tmp_path / f"{kind}.jsonl", b"\n", row)), type=kind)  # type: ignore[arg-type]
        for kind, row in ROWS.items()
    ]
    examples = load_examples(sources, tokenizer, seq_len=128)
    assert len(examples) == 3
    assert examples[0] == examples[1] == examples[2]


@pytest.mark.parametrize(
    ("lines", "kind", "message"),
    [
        ([], "messages", r"holds no rows"),
        ([b"\n \n"], "messages", r"holds no rows"),
        ([b'{"messages": "\xff\xfe"}\n'], "messages", r":1 is not UTF-8"),
        ([ROWS["messages"], b'{"messages": \n'], "messages", r":2 is not one JSON object"),
        ([b"[" * 100_000], "messages", r":1 is not one JSON object"),
        ([[1]], "messages", r":1 is not a JSON object"),
        ([{"messages": []}], "messages", r"must be a list of objects"),
        ([{"messages": ["hi"]}], "messages", r"must be a list of objects"),
        (
            [{"messages": [{"role": "user", "content": "x"}]}],
            "messages",
            r"last message must be the assistant's",
        ),
        ([ROWS["alpaca"]], "messages", r"messages must be a list"),
        (
            [{"prompt": "x", "completion": " \t"}],
            "prompt_completion",
            r"completion must be a text that is not empty",
        ),
        ([{"prompt": "", "completion": "x"}], "prompt_completion", r"prompt must be a text"),
        ([{"instruction": "x", "output": None}], "alpaca", r"output must be a text"),
        ([{"instruction": "x", "input": 3, "output": "y"}], "alpaca", r"input must be a text"),
        (
            [{"prompt": "red " * 200, "completion": "x"}],
            "prompt_completion",
            r"tokens, train\.seq_len is 128",
        ),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_refused(
    lines: list[Any], kind: str, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = write(tmp_path / "rows.jsonl", *lines)
    with pytest.raises(DataError, match=message) as refused:
        load(path, tokenizer, kind)
    assert "rows.jsonl" in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        load(tmp_path / "nowhere.jsonl", tokenizer)


def test_padding_is_neither_seen_nor_learned() -> None:
    batch = collate([Example(ids=(5, 6, 7), prompt_tokens=1), Example(ids=(8, 9), prompt_tokens=1)], pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert batch.answer_tokens == 3


def first_tokens(rows: int, micro: int, seed: int, count: int) -> list[list[int]]:
    examples = [Example(ids=(row, 1), prompt_tokens=1) for row in range(rows)]
    stream = batches(examples, rows=micro, pad_id=0, seed=seed)
    return [batch.ids[:, 0].tolist() for batch, _ in itertools.islice(stream, count)]


@given(rows=st.integers(1, 20), micro=st.integers(1, 8), seed=st.integers(0, 1000))
def test_each_epoch_sees_every_row_once(rows: int, micro: int, seed: int) -> None:
    per_epoch = -(-rows // micro)
    seen = first_tokens(rows, micro, seed, 2 * per_epoch)
    assert sorted(itertools.chain(*seen[:per_epoch])) == list(range(rows))
    assert sorted(itertools.chain(*seen[per_epoch:])) == list(range(rows))


def test_the_seed_decides_the_order() -> None:
    assert first_tokens(20, 4, 1, 10) == first_tokens(20, 4, 1, 10)
    assert first_tokens(20, 4, 1, 10) != first_tokens(20, 4, 2, 10)
