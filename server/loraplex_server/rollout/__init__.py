"""Calls split between the tags of an adapter, and canaries that lose their share when they do worse."""
