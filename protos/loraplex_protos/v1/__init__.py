"""Version 1 of the wire contract. Generated modules are committed and never edited."""
