"""Two tenants who read the same messages and want different lines from them.

Both tenants receive the same kind of customer message. `acme/orders` wants its warehouse line,
`globex/tickets` its help-desk line, and each has house rules nobody else knows. So the same prompt has three different
answers (base model, tenant A, tenant B), which makes it visible whose adapter answered.

Everything here is deterministic in its arguments. A message belongs to exactly one split, decided by a hash of its
text, so no held-out prompt can appear among the training prompts of any task, seed or size.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypedDict

NAMES: Final = tuple(
    "Maria Jonas Amina Pedro Yuki Olga Liam Nora Omar Chloe Ivan Priya Hugo Greta Kofi Elena".split()
)
CITIES: Final = tuple(
    "Oslo Lima Cairo Paris Delhi Quito Accra Sofia Kyoto Boston Madrid Nairobi Lisbon Dublin Havana Tallinn".split()
)
COLOURS: Final = ("red", "blue", "green", "black", "white", "yellow", "purple", "orange")
DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ITEMS: Final = (
    *("lamps", "chairs", "tables", "mirrors", "carpets"),
    *("phones", "radios", "cameras", "laptops", "printers"),
    *("coats", "shoes", "shirts", "gloves", "scarves"),
)

# The rules of globex alone: which desk takes an item, how urgent a day is.
_GLOBEX_DESK: Final = {item: ("home", "tech", "wear")[i // 5] for i, item in enumerate(ITEMS)}
_GLOBEX_PRIORITY: Final = dict(zip(DAYS, ("P1", "P1", "P2", "P2", "P2", "P3", "P3"), strict=True))

_TEMPLATES: Final = (
    "{name} from {city} wants {quantity} {colour} {item} by {day}, order {number}.",
    "Order {number}: {quantity} {colour} {item} for {name} in {city}, due {day}.",
    "Please send {quantity} {colour} {item} to {name} in {city} before {day}, order {number}.",
    "This is {name}. I need {quantity} {colour} {item} in {city} on {day}, order {number}.",
)

Split = Literal["train", "heldout"]


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Row(TypedDict):
    """One example: the whole conversation, and the answer an exact-match score compares with."""

    messages: list[ChatMessage]
    answer: str


@dataclass(frozen=True)
class Message:
    """A customer message and the facts in it."""

    text: str
    name: str
    city: str
    colour: str
    item: str
    day: str
    quantity: str
    number: str


def random_message(rng: random.Random) -> Message:
    """Draw one message; about 6e10 different ones exist."""
    facts = {
        "name": rng.choice(NAMES),
        "city": rng.choice(CITIES),
        "colour": rng.choice(COLOURS),
        "item": rng.choice(ITEMS),
        "day": rng.choice(DAYS),
        "quantity": str(rng.randint(2, 9)),
        "number": str(rng.randint(1000, 9999)),
    }
    return Message(text=rng.choice(_TEMPLATES).format(**facts), **facts)


def acme_orders(message: Message) -> str:
    """Write the warehouse line of acme: reference, goods, count, destination."""
    m = message
    return f"REF {m.number} | SKU {m.item} {m.colour} | QTY {m.quantity} | SHIP {m.city}"


def globex_tickets(message: Message) -> str:
    """Write the help-desk line of globex: caller, case number, goods and their desk, weekday and its priority."""
    m = message
    return f"{m.name} | {m.number} | {m.item} {_GLOBEX_DESK[m.item]} | {m.day} {_GLOBEX_PRIORITY[m.day]}"


TASKS: Final[dict[str, Callable[[Message], str]]] = {
    "acme/orders": acme_orders,
    "globex/tickets": globex_tickets,
}


def split_of(text: str) -> Split:
    """Tell which split owns a message text: one in eight is held out, whoever asks."""
    return "heldout" if hashlib.sha256(text.encode()).digest()[0] < 32 else "train"


def messages(split: Split, seed: int) -> Iterator[Message]:
    """Yield different messages of one split without end (about 6e10 exist); the same seed gives the same order."""
    rng = random.Random(f"{split}:{seed}")
    seen: set[str] = set()
    while True:
        message = random_message(rng)
        if message.text not in seen and split_of(message.text) == split:
            seen.add(message.text)
            yield message


def dataset(task: str, split: Split, n: int, seed: int = 0) -> list[Row]:
    """Return `n` different examples of a tenant's task.

    Two tasks with the same split and seed get the same prompts, so their answers can be laid side by side.

    Args:
        task: a key of `TASKS`, "tenant/adapter".
        split: "train" or "heldout"; no prompt is in both.
        n: how many rows, 0 or more.
        seed: which rows; the same seed always gives the same rows, and a longer list begins with the shorter one.

    Raises:
        ValueError: the task or the split is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(sorted(TASKS))}")
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}; there are train and heldout")
    answer_of = TASKS[task]
    return [
        _row(message.text, answer_of(message))
        for message, _ in zip(messages(split, seed), range(n), strict=False)
    ]


def _row(prompt: str, answer: str) -> Row:
    turns: list[ChatMessage] = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, "answer": answer}


def vocabulary() -> tuple[str, ...]:
    """Return every word the tasks can use, so that a tokenizer trained on other text covers them."""
    marks = "REF SKU QTY SHIP P1 P2 P3 home tech wear |".split()
    frames = [word.strip(".,:") for text in _TEMPLATES for word in text.split() if "{" not in word]
    return (*NAMES, *CITIES, *COLOURS, *DAYS, *ITEMS, *dict.fromkeys(frames), *marks)
