"""Completion scripts for bash, zsh and fish, written from the parser of the command line itself.

A script is static text, so a TAB costs no start of Python; only references are asked for, with
`registry completion refs WORD`, which looks into the registry that is set. A library such as argcomplete would start
the program on every TAB and be one more dependency of everybody for one command's sake; what is needed is below.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

SHELLS: Final = ("bash", "zsh", "fish")

# What an argument takes, told by its metavar: paths, references, or both.
_PATHS = re.compile(r"\b(?:FILE|DIR|PATH|KEY|BASE)\b")
_REFERENCES = re.compile(r"\b(?:REF|TENANT|ADAPTER)\b")


@dataclass
class Word:
    """An option or an argument: its names (none for an argument), what it takes, and what it is for."""

    names: tuple[str, ...]
    takes: str  # "", "files", "refs", "both", "text", or "one of:" and words with spaces between
    help: str


@dataclass
class Syntax:
    """What may stand behind a command, or behind an action of a command."""

    summary: str
    options: list[Word] = field(default_factory=list)
    arguments: list[Word] = field(default_factory=list)
    actions: dict[str, Syntax] = field(default_factory=dict)


def syntax_of(parser: argparse.ArgumentParser, summary: str) -> Syntax:
    """Return what a parser accepts."""
    syntax = Syntax(summary)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                syntax.actions[name] = syntax_of(inner, texts.get(name, ""))
        elif action.help != argparse.SUPPRESS:
            word = Word(tuple(action.option_strings), _takes(action), _plain(action.help or ""))
            (syntax.options if word.names else syntax.arguments).append(word)
    return syntax


def _takes(action: argparse.Action) -> str:
    if action.option_strings and action.nargs == 0:
        return ""
    if action.choices:
        return "one of: " + " ".join(map(str, action.choices))
    name = str(action.metavar or action.dest.upper())
    paths, references = _PATHS.search(name), _REFERENCES.search(name)
    if paths and references:
        return "both"
    return "files" if paths else "refs" if references else "text"


def _plain(text: str) -> str:
    """Return a help text free of what any of the shells would read as its own."""
    return re.sub(r"[^\w .,;@/…-]", "", text.replace("%%", "%"))


def script(shell: str, commands: Mapping[str, Syntax], common: Syntax) -> str:
    """Return the completion script of one of SHELLS."""
    makers: dict[str, Callable[[Mapping[str, Syntax], Syntax], str]] = {
        "bash": _bash,
        "zsh": _zsh,
        "fish": _fish,
    }
    return makers[shell](commands, common)


def _all_places(commands: Mapping[str, Syntax]) -> dict[str, Syntax]:
    """Return every command, and every action as `command action`."""
    places: dict[str, Syntax] = {}
    for name, syntax in commands.items():
        places[name] = syntax
        places.update({f"{name} {action}": inner for action, inner in syntax.actions.items()})
    return places


_BASH: Final = r"""# bash completion for registry; load it with: source <(registry completion bash)
_registry() {
    local words word place='' action='' options='' valued='' actions='' wanted='' count=0 i kinds=()
    # The line itself is read, because bash cuts words at @ and : too.
    read -ra words <<<"${COMP_LINE:0:COMP_POINT}"
    [[ ${COMP_LINE:0:COMP_POINT} == *[[:space:]] ]] && words+=('')
    local last=$((${#words[@]} - 1))
    local cur=${words[last]}
    _registry_syntax ''
    for ((i = 1; i < last; i++)); do
        word=${words[i]}
        wanted=''
        if [[ $word == -* ]]; then
            [[ " $valued " == *" $word="* && $word != *=* ]] && wanted=$word && ((i++))
        elif [[ " $actions " == *" $word "* ]]; then
            place="${place:+$place }$word"
            _registry_syntax "$place"
        else
            ((count++))
        fi
    done
    # The last word is the value of the option before it when the loop has stepped over it.
    local kind=''
    if ((i > last)) && [[ -n $wanted ]]; then
        kind=" $valued"
        kind=${kind#*" $wanted="}
        kind=${kind%% *}
    elif [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
        return
    elif [[ -n $actions ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$actions" -- "$cur")
        return
    else
        kind=${kinds[count]:-}
    fi
    COMPREPLY=()
    case $kind in
        files | both) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null ;;
        one:*) mapfile -t COMPREPLY < <(compgen -W "${kind//[:,]/ }" -- "$cur") ;;
    esac
    case $kind in
        refs | both)
            while read -r word; do COMPREPLY+=("$word"); done < <(registry completion refs -- "$cur" 2>/dev/null)
            ;;
    esac
    # Bash replaces only what stands behind the last character at which it cuts words.
    local head=${cur%"${cur##*[@:]}"}
    [[ -n $head && $COMP_WORDBREAKS == *"${head: -1}"* ]] && COMPREPLY=("${COMPREPLY[@]#"$head"}")
}
"""


def _bash(commands: Mapping[str, Syntax], common: Syntax) -> str:
    lines = [_BASH + "_registry_syntax() {", "    kinds=()", "    case $1 in"]
    top = Syntax("", common.options, [], dict(commands))
    for place, syntax in {"": top, **_all_places(commands)}.items():
        options = [*syntax.options, *([] if syntax.options else common.options)]
        names = " ".join(name for word in options for name in word.names)
        valued = " ".join(
            f"{name}={_bash_kind(word)}" for word in options if word.takes for name in word.names
        )
        kinds = " ".join(_bash_kind(word) for word in syntax.arguments)
        lines.append(
            f"        '{place}') options='{names}'; valued='{valued} '; actions='{' '.join(syntax.actions)}'; "
            f"kinds=({kinds}) ;;"
        )
    return "\n".join([*lines, "    esac", "}", "complete -F _registry registry", ""])


def _bash_kind(word: Word) -> str:
    if word.takes.startswith("one of: "):
        return "one:" + word.takes.removeprefix("one of: ").replace(" ", ",")
    return word.takes


_ZSH: Final = r"""#compdef registry
# zsh completion for registry; load it with: source <(registry completion zsh)
_registry_refs() {
    local -a found
    found=(${(f)"$(registry completion refs -- "$PREFIX" 2>/dev/null)"})
    compadd -a found
}
_registry_both() { _files; _registry_refs }
"""


def _zsh(commands: Mapping[str, Syntax], common: Syntax) -> str:
    lines = [_ZSH]
    for place, syntax in _all_places(commands).items():
        lines.append(_zsh_function("_registry_" + re.sub("[ -]", "_", place), syntax, common))
    lines.append(_zsh_function("_registry", Syntax("", common.options, [], dict(commands)), common))
    return "\n".join(
        [
            *lines,
            'if [[ $funcstack[1] == _registry ]]; then _registry "$@"; else compdef _registry registry; fi',
            "",
        ]
    )


def _zsh_function(name: str, syntax: Syntax, common: Syntax) -> str:
    specs = [
        f"'{option}[{word.help}]{':value:' + _zsh_action(word) if word.takes else ''}'"
        for word in (syntax.options or common.options)
        for option in word.names
    ]
    if not syntax.actions:
        specs += [
            f"'{number}:{word.help}:{_zsh_action(word)}'" for number, word in enumerate(syntax.arguments, 1)
        ]
        return "\n".join(
            [
                f"{name}() {{",
                "    _arguments -s \\",
                *(f"        {spec} \\" for spec in specs),
                "        && return",
                "}",
            ]
        )
    words = " ".join(f"'{action}:{_plain(inner.summary)}'" for action, inner in syntax.actions.items())
    cases = [f"        {action}) {name}_{action.replace('-', '_')} ;;" for action in syntax.actions]
    return "\n".join(
        [
            f"{name}() {{",
            "    local line state",
            f"    local -a actions=({words})",
            "    _arguments -C \\",
            *(f"        {spec} \\" for spec in specs),
            "        '1:command:->action' '*::argument:->rest' && return",
            "    case $state in",
            "    action) _describe command actions ;;",
            "    rest) case $line[1] in",
            *cases,
            "        esac ;;",
            "    esac",
            "}",
        ]
    )


def _zsh_action(word: Word) -> str:
    if word.takes.startswith("one of: "):
        return f"({word.takes.removeprefix('one of: ')})"
    return {"files": "_files", "refs": "_registry_refs", "both": "_registry_both"}.get(word.takes, " ")


_FISH: Final = r"""# fish completion for registry; load it with: registry completion fish | source
function __registry_refs
    registry completion refs -- (commandline -ct) 2>/dev/null
end
function __registry_words
    commandline -opc | string match -rv '^-'
end
function __registry_at # the words behind registry are these, and maybe more
    set -l words (__registry_words)
    test (count $words) -gt (count $argv); and test "$words[2..$(math 1 + (count $argv))]" = "$argv"
end
function __registry_only # the words behind registry are exactly these
    test (count (__registry_words)) -eq (math 1 + (count $argv)); and begin
        test (count $argv) -eq 0; or __registry_at $argv
    end
end
complete -c registry -f"""


def _fish(commands: Mapping[str, Syntax], common: Syntax) -> str:
    lines = [_FISH, *(_fish_option("__registry_only", word) for word in common.options)]
    for name, syntax in commands.items():
        lines.append(f"complete -c registry -n __registry_only -a {name} -d '{_plain(syntax.summary)}'")
        for action, inner in syntax.actions.items():
            lines.append(
                f"complete -c registry -n '__registry_only {name}' -a {action} -d '{_plain(inner.summary)}'"
            )
            lines += _fish_words(f"'__registry_at {name} {action}'", inner)
        if not syntax.actions:
            lines += _fish_words(f"'__registry_at {name}'", syntax)
    return "\n".join([*lines, ""])


def _fish_words(condition: str, syntax: Syntax) -> list[str]:
    lines = [_fish_option(condition, word) for word in syntax.options]
    takes = {word.takes for word in syntax.arguments}
    if takes & {"refs", "both"}:
        lines.append(f"complete -c registry -n {condition} -a '(__registry_refs)'")
    if takes & {"files", "both"}:
        lines.append(f"complete -c registry -n {condition} -F")
    for word in syntax.arguments:
        if word.takes.startswith("one of: "):
            lines.append(f"complete -c registry -n {condition} -a '{word.takes.removeprefix('one of: ')}'")
    return lines


def _fish_option(condition: str, word: Word) -> str:
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in word.names)
    if word.takes.startswith("one of: "):
        value = f" -x -a '{word.takes.removeprefix('one of: ')}'"
    else:
        value = {"": "", "files": " -r -F", "refs": " -x -a '(__registry_refs)'"}.get(word.takes, " -x")
    return f"complete -c registry -n {condition} {names}{value} -d '{word.help}'"
