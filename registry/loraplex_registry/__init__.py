"""Signed, versioned LoRA adapters in a bucket or a directory.

Programs use `registry.Registry`; people use the `registry` command. Importing this package does nothing.
"""
