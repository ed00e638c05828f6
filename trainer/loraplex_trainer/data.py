"""Instruction data: JSONL rows to token ids with the loss on answers only.

Row types:
    messages            {"messages": [{"role", "content"}, ...]}, the last one the assistant's
    alpaca              {"instruction", "input" (may be empty or missing), "output"}
    prompt_completion   {"prompt", "completion"}

Prompts are rendered by the tokenizer's chat template; a base without one gets prompt and answer as plain text. What
is learned is the last answer and the end-of-sequence token after it. Other keys of a row are left alone. A row that
cannot be learned from is refused with its file and line before the first step, never skipped or cut.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_trainer.config import DataSource
from loraplex_trainer.errors import DataError

if TYPE_CHECKING:
    import torch

ROWS_MAX = 10_000_000
ROW_BYTES_MAX = 16 << 20
IGNORED = -100  # the label torch's cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """One row as token ids: `ids[prompt_tokens:]` is what is learned."""

    ids: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Batch:
    """Rows padded to the longest: three int64 tensors of shape (rows, tokens).

    `labels` is `IGNORED` on prompts and padding; `answer_tokens` counts the rest.
    """

    ids: "torch.Tensor"
    mask: "torch.Tensor"
    labels: "torch.Tensor"
    answer_tokens: int


def load_examples(sources: Sequence[DataSource], tokenizer: Any, *, seq_len: int) -> list[Example]:
    """Read and encode every row of every source.

    Args:
        sources: the files.
        tokenizer: the base model's, of transformers.
        seq_len: longest row in tokens.

    Raises:
        DataError: a file is missing or empty, a row is malformed, empty, or longer than `seq_len`.
    """
    examples: list[Example] = []
    for source in sources:
        path = Path(source.path)
        before = len(examples)
        for number, row in _rows(path):
            where = f"{path}:{number}"
            turns = _turns(row, source.type, where=where)
            examples.append(_encode(turns, tokenizer, seq_len=seq_len, where=where))
        if len(examples) == before:
            raise DataError(f"{path} holds no rows")
    return examples


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(ROW_BYTES_MAX + 1), b"")
            for number, line in enumerate(lines, 1):
                if len(line) > ROW_BYTES_MAX:
                    raise DataError(f"{path}:{number} is longer than {ROW_BYTES_MAX} bytes")
                if number > ROWS_MAX:
                    raise DataError(f"{path} has more than {ROWS_MAX} rows")
                if line.strip():
                    yield number, _row(line, where=f"{path}:{number}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _row(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise DataError(f"{where} is not one JSON object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object")
    return row


def _turns(row: dict[str, Any], kind: str, *, where: str) -> list[dict[str, str]]:
    """Give the conversation of a row; its last turn is the answer."""
    if kind == "messages":
        turns = row.get("messages")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{where}: messages must be a list of objects")
        if turns[-1].get("role") != "assistant":
            raise DataError(f"{where}: the last message must be the assistant's")
        return [{key: _text(turn, key, where=where) for key in ("role", "content")} for turn in turns]
    if kind == "alpaca":
        question = _text(row, "instruction", where=where)
        if row.get("input"):
            question += "\n\n" + _text(row, "input", where=where)
        answer = _text(row, "output", where=where)
    else:
        question = _text(row, "prompt", where=where)
        answer = _text(row, "completion", where=where)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: dict[str, Any], key: str, *, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} must be a text that is not empty")
    return value


def _encode(turns: list[dict[str, str]], tokenizer: Any, *, seq_len: int, where: str) -> Example:
    prompt, answer = _render(turns, tokenizer, where=where)
    special = not tokenizer.chat_template  # a template writes its own special tokens
    prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not answer_ids:
        raise DataError(f"{where}: the answer has no tokens")
    length = len(prompt_ids) + len(answer_ids)
    if length > seq_len:
        raise DataError(
            f"{where} has {length} tokens, train.seq_len is {seq_len}: shorten the row or raise it"
        )
    return Example(ids=(*prompt_ids, *answer_ids), prompt_tokens=len(prompt_ids))


def _render(turns: list[dict[str, str]], tokenizer: Any, *, where: str) -> tuple[str, str]:
    """Give prompt and answer as text, the end-of-sequence token included in the answer."""
    if not tokenizer.chat_template:
        if len(turns) != 2:
            raise DataError(f"{where}: this base has no chat template, so a row is one prompt and one answer")
        return turns[0]["content"], turns[1]["content"] + (tokenizer.eos_token or "")
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise DataError(f"{where}: the base's chat template changes a prompt once it is answered")
    return prompt, whole[len(prompt) :]


def batches(
    examples: Sequence[Example], *, rows: int, pad_id: int, seed: int
) -> Iterator[tuple["Batch", float]]:
    """Yield batches without end, in a new order each epoch, with the epochs done after each.

    The same seed gives the same batches. The last batch of an epoch may be smaller.
    """
    rng = random.Random(seed)  # noqa: S311  (row order, not secrets)
    order = list(range(len(examples)))
    epoch = 0
    while True:
        rng.shuffle(order)
        for start in range(0, len(order), rows):
            chosen = [examples[index] for index in order[start : start + rows]]
            yield collate(chosen, pad_id=pad_id), epoch + min(1.0, (start + rows) / len(order))
        epoch += 1


def collate(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Pad rows on the right to the longest."""
    import torch

    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, example.prompt_tokens : length] = ids[row, example.prompt_tokens : length]
    return Batch(ids=ids, mask=mask, labels=labels, answer_tokens=int((labels != IGNORED).sum()))
