"""Whose signature counts for what, and what is not to be trusted any more."""
