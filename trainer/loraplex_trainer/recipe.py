"""One training run, top to bottom: load, step, evaluate, save.

The loop is our own and plain: AdamW on the adapter alone, linear warmup, half a cosine down to a tenth, gradients
summed over micro batches and divided by the number of answer tokens of the whole step, so that k micro batches
give the same step as one batch k times as large.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_registry.validation.base import CARD_NAME, BaseModel
from loraplex_trainer.config import TrainConfig
from loraplex_trainer.data import IGNORED, Batch, Example, batches, collate, load_examples
from loraplex_trainer.errors import ConfigError, DivergedError
from loraplex_trainer.methods import build_model, load_tokenizer, model_directory

if TYPE_CHECKING:
    import torch

FLOOR = 0.1  # of the highest learning rate, at the end


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is known after an optimizer step. `eval_loss` is None between evaluations."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    eval_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        adapter_dir: adapter_config.json, adapter_model.safetensors and the base card.
        loss: mean over the last tenth of the steps, per answer token.
        eval_loss: per held-out answer token, None without evaluation data.
        adapter_bytes: size of the weights file.
    """

    adapter_dir: Path
    base: BaseModel
    steps: int
    loss: float
    eval_loss: float | None
    trainable_parameters: int
    adapter_bytes: int
    seconds: float


Progress = Callable[[Step], None]


def train(config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Run a training from its settings.

    Raises:
        ConfigError: the base cannot be had, a target does not fit, or the output directory is not empty.
        DataError: a data file cannot be trained on.
        DivergedError: the loss is no number any more; nothing is written.
    """
    import torch

    started = time.monotonic()
    output = _claim_output(Path(config.output))
    directory = model_directory(config.base_model)
    tokenizer = load_tokenizer(directory)
    examples = load_examples(config.data, tokenizer, seq_len=config.train.seq_len)
    held_out = load_examples(config.eval.data, tokenizer, seq_len=config.train.seq_len)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    torch.manual_seed(config.train.seed)
    model = build_model(config, directory)
    losses = []
    last: Step | None = None
    for last in fit(model, examples, held_out, config, pad_id=pad_id):
        losses.append(last.loss)
        if progress is not None:
            progress(last)
    assert last is not None
    base = BaseModel.from_directory(directory, name=Path(config.base_model).name)
    save_adapter(model, output, base=base, dtype=config.train.save_dtype)
    tail = losses[-max(1, len(losses) // 10) :]
    return TrainResult(
        adapter_dir=output,
        base=base,
        steps=last.step,
        loss=sum(tail) / len(tail),
        eval_loss=last.eval_loss,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter_bytes=(output / "adapter_model.safetensors").stat().st_size,
        seconds=time.monotonic() - started,
    )


def fit(
    model: Any, examples: Sequence[Example], held_out: Sequence[Example], config: TrainConfig, *, pad_id: int
) -> Iterator[Step]:
    """Train a model in place, yielding after each optimizer step.

    Raises:
        DivergedError: the loss or its gradient is NaN or infinite; the model is left as before that step.
    """
    import torch

    settings = config.train
    steps = total_steps(config, rows=len(examples))
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=settings.lr, weight_decay=0.0)
    stream = batches(examples, rows=settings.micro_batch, pad_id=pad_id, seed=settings.seed)
    model.train()
    for step in range(1, steps + 1):
        lr = learning_rate(step, steps=steps, highest=settings.lr, warmup=settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro = [batch for batch, _ in itertools.islice(stream, settings.grad_accum)]
        loss = accumulate(model, micro)
        norm = float(torch.nn.utils.clip_grad_norm_(adapter, settings.clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"loss {loss}, gradient norm {norm} at step {step} of {steps}: lower train.lr "
                f"(now {settings.lr:g}), lengthen train.warmup, or try train.dtype=fp32"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        due = step == steps or (config.eval.every and step % config.eval.every == 0)
        eval_loss = evaluate(model, held_out, rows=settings.micro_batch, pad_id=pad_id) if due else None
        yield Step(step=step, steps=steps, loss=loss, lr=lr, grad_norm=norm, eval_loss=eval_loss)


def accumulate(model: Any, micro: Sequence[Batch]) -> float:
    """Add the gradient of several micro batches, normalised by all their answer tokens; gives the mean loss."""
    tokens = sum(batch.answer_tokens for batch in micro)
    total = 0.0
    for batch in micro:
        loss = summed_loss(model, batch) / tokens
        loss.backward()
        total += float(loss.detach())
    return total


def summed_loss(model: Any, batch: Batch) -> "torch.Tensor":
    """Cross entropy summed over a batch's answer tokens, in fp32.

    Only positions that predict an answer token go through the loss: with a large vocabulary the logits of
    prompts are most of the memory.
    """
    import torch

    device = next(model.parameters()).device
    logits = model(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device)).logits
    targets = batch.labels[:, 1:].to(device)
    wanted = targets != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][wanted].float(), targets[wanted], reduction="sum")


def evaluate(model: Any, examples: Sequence[Example], *, rows: int, pad_id: int) -> float | None:
    """Mean loss per answer token of held-out rows, None without rows. The model is in train mode afterwards."""
    import torch

    if not examples:
        return None
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(examples), rows):
            batch = collate(examples[start : start + rows], pad_id=pad_id)
            total += float(summed_loss(model, batch))
            tokens += batch.answer_tokens
    model.train()
    return total / tokens


def total_steps(config: TrainConfig, *, rows: int) -> int:
    """Optimizer steps of a run: `max_steps`, or what the epochs need, at least one."""
    if config.train.max_steps:
        return config.train.max_steps
    per_epoch = math.ceil(rows / config.train.micro_batch)
    return max(1, math.ceil(config.train.epochs * per_epoch / config.train.grad_accum))


def learning_rate(step: int, *, steps: int, highest: float, warmup: float) -> float:
    """Learning rate of step 1..steps: a line up to `highest` over the warmup, then half a cosine to a tenth."""
    rising = math.ceil(warmup * steps)
    if step <= rising:
        return highest * step / rising
    done = (step - rising) / max(1, steps - rising)
    return highest * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)


def save_adapter(model: Any, output: Path, *, base: BaseModel, dtype: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors and the base card; never the embeddings.

    The configuration names the base, not where it lies on this machine, and lists its modules in order, so that
    the same training gives the same bytes.
    """
    import torch
    from safetensors.torch import load_file, save_file

    model.save_pretrained(output, save_embedding_layers=False)
    (output / "README.md").unlink(missing_ok=True)  # PEFT's card template, all of it blank
    weights = output / "adapter_model.safetensors"
    number = torch.bfloat16 if dtype == "bf16" else torch.float32
    tensors = {name: tensor.to(number).contiguous() for name, tensor in sorted(load_file(weights).items())}
    save_file(tensors, weights, metadata={"format": "pt"})
    path = output / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"] = base.name
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (output / CARD_NAME).write_bytes(base.to_json())


def _claim_output(output: Path) -> Path:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output {output} is not empty; choose another or remove it")
    output.mkdir(parents=True, exist_ok=True)
    return output
