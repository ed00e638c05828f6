"""Adapters from and to other formats."""
