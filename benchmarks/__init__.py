"""Benchmarks: one module per question, each `python -m benchmarks.<name> --json`. They measure, never assert."""
