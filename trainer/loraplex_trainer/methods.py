"""The base model with an adapter on it, ready to train: LoRA, and QLoRA on an NF4 base.

LoRA: E. Hu et al., arXiv 2106.09685. QLoRA (NF4 with double quantization, bf16 compute): T. Dettmers et al.,
arXiv 2305.14314. The base is never changed and never saved.
"""

from pathlib import Path
from typing import Any

from loraplex_registry.errors import SettingsError
from loraplex_registry.validation.checkpoint import checkpoint_directory
from loraplex_trainer.config import TrainConfig
from loraplex_trainer.errors import ConfigError


def model_directory(base_model: str) -> Path:
    """Find the base model's files: a directory as it is, anything else as a Hugging Face id.

    Raises:
        ConfigError: neither.
    """
    try:
        return checkpoint_directory(base_model)
    except SettingsError as error:
        raise ConfigError(f"base_model: {error}") from error


def load_tokenizer(directory: Path) -> Any:
    """Load the base's tokenizer; code from the repository is never run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def build_model(config: TrainConfig, directory: Path) -> Any:
    """Load the base and put a fresh adapter on it; only the adapter's weights (fp32) can be trained.

    Seed torch before: the adapter's first weights are random.

    Raises:
        ConfigError: `lora.target` names no layer of this base.
    """
    from peft import LoraConfig, get_peft_model

    base = _load_base(config, directory)
    target = config.lora.target
    settings = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target {target!r} does not fit this base: {error}") from error
    model.config.use_cache = False
    return model


def _load_base(config: TrainConfig, directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "device_map": {"": device}}
    if config.method == "lora":
        return AutoModelForCausalLM.from_pretrained(directory, **arguments)
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantization, **arguments)
    keep_gradients_on_cpu(base)
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def keep_gradients_on_cpu(model: Any) -> int:
    """Keep bitsandbytes from breaking gradients after an evaluation; gives the number of layers guarded.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs 4-bit weights anew at the first forward pass in eval mode,
    and its product with packed weights passes no gradient on: training goes on without an error and learns almost
    nothing in all layers but the last (measured: a gradient 13 times too small). Clearing the flag keeps the
    layers on the differentiable path. tests/trainer shows fault and cure.
    """
    import bitsandbytes

    guarded = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            guarded += 1
    return guarded
