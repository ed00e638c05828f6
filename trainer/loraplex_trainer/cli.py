"""`loraplex train config.yaml [key=value ...]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from loraplex_registry.errors import RegistryError
from loraplex_registry.progress import readable
from loraplex_trainer.config import TrainConfig, load_config
from loraplex_trainer.errors import TrainerError
from loraplex_trainer.publish import destination, publish
from loraplex_trainer.recipe import Step, TrainResult, train

_WIDTH = 24


class StepPrinter:
    """Shows a run's progress: one line redrawn on a terminal, ten lines in all elsewhere."""

    def __init__(self, stream: TextIO, *, label: str = "train") -> None:
        self._stream = stream
        self._label = label

    def __call__(self, step: Step) -> None:
        """Show a step."""
        ended = step.step == step.steps
        text = f"{self._label} step {step.step}/{step.steps}  loss {step.loss:.3f}"
        if step.eval_loss is not None:
            text += f"  held-out loss {step.eval_loss:.3f}"
        if self._stream.isatty():
            bar = "█" * (_WIDTH * step.step // step.steps)
            self._stream.write(f"\r{bar:<{_WIDTH}} {text}\x1b[K" + ("\n" if ended else ""))
        elif ended or step.step % max(1, step.steps // 10) == 0 or step.eval_loss is not None:
            self._stream.write(text + "\n")
        self._stream.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and publish when asked; exit status 0, 2 for wrong settings or data, 1 for everything else."""
    parser = argparse.ArgumentParser(
        prog="loraplex train",
        description="Train an adapter from instruction data; publish it signed when the settings say where.",
    )
    parser.add_argument("config", type=Path, help="settings (YAML); see docs/training.md")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes, such as train.lr=1e-3")
    options = parser.parse_args(arguments)
    # Before torch is loaded: beside other programs, threads that spin while they wait slow training down many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet_libraries()
    try:
        config = load_config(options.config, options.changes)
        target = destination(config.publish, os.environ) if config.publish.ref else None
        result = train(config, StepPrinter(sys.stderr))
        print(_summary(config, result))
        if target is not None:
            published = publish(result, config.publish, target)
            did = "pushed" if published.created else "already pushed"
            print(f"{did} {published.ref} (version {published.version})")
    except TrainerError as error:
        print(f"loraplex train: {error}", file=sys.stderr)
        return 2
    except RegistryError as error:
        print(f"loraplex train: {error} [{error.code}]", file=sys.stderr)
        return 1
    return 0


def quiet_libraries() -> None:
    """Keep transformers' own bars and bitsandbytes' hints about optional kernels off the terminal."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _summary(config: TrainConfig, result: TrainResult) -> str:
    held_out = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.3f}"
    return (
        f"{config.method} on {result.base.name}: {result.steps} steps in {result.seconds:.0f} s, "
        f"loss {result.loss:.3f}{held_out}\n"
        f"{result.trainable_parameters:,} parameters trained, {readable(result.adapter_bytes)} "
        f"in {result.adapter_dir}"
    )


if __name__ == "__main__":
    sys.exit(main())
