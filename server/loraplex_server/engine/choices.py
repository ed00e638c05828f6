"""One of a few texts, as the grammar that makes an engine say nothing else. Pure."""


def choice_grammar(choices: tuple[str, ...]) -> str:
    """Return the EBNF grammar of one of these texts; everything but letters and digits of ASCII is escaped."""
    return "root ::= " + " | ".join('"' + "".join(map(_escaped, text)) + '"' for text in choices)


def _escaped(letter: str) -> str:
    return letter if letter.isascii() and letter.isalnum() else f"\\U{ord(letter):08x}"
