"""Campaigns against a running server with the deterministic engine: short in `make test`, long in `make reliability`.

A module for each subject. Every function returns what it counted; the callers judge.
"""
