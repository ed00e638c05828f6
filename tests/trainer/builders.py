"""What the trainer's tests share."""

from collections.abc import Callable

from loraplex_examples.tiny_base import Recipe
from loraplex_trainer.config import TrainConfig

# Two steps leave the weights random: the tests need a Llama with a tokenizer, not one that knows something.
SMALL = Recipe(steps=2, batch_rows=4, hidden_size=64, layers=2, heads=2, ffn_size=128)

ConfigMaker = Callable[..., TrainConfig]
