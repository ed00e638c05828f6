"""Whether files are a plain LoRA adapter that fits its base model."""
