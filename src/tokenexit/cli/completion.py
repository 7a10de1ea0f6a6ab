"""Completion: the script that a shell reads once, and the answer each time it asks what may follow on a line.

The script runs the program anew at every press of Tab, with the line in the environment. No script knows the options,
so none goes stale: the command on the line makes its parser as always, and that answers instead of parsing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tokenexit.cli.options import asked_by_shell, command_parser


def completion(arguments: list[str]) -> int:
    parser = command_parser("completion", "Print a script by which a shell completes commands, options and files.")
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="shell that reads the script at its start")
    options = parser.parse_args(arguments)
    from argcomplete.shell_integration import shellcode

    print(shellcode(["tokenexit"], shell=options.shell), end="")
    return 0


def answer_shell(commands: Mapping[str, Callable[[list[str]], int]]) -> None:
    """Say what may follow on the line that a shell asks about, and end the program; return if none asks."""
    if not asked_by_shell():
        return
    from argcomplete.lexers import split_line

    *_, before, _ = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    if len(before) > 1 and before[1] in commands:
        os.environ["_ARGCOMPLETE"] = "2"  # the command is the second word, its arguments come after it
        commands[before[1]]([])
    parser = command_parser("COMMAND", "")
    parser.add_argument("command", choices=commands, help="command to run")
    parser.add_argument("--version", action="store_true", help="version of the package")
    parser.parse_args([])


def complete_values(parser: Any, known: Mapping[str, Iterable[str]]) -> None:
    """Complete what jsonargparse's options take: words that are known or that its help says, else files.

    known: words by the name of the option; those of `config` are taken beside files.
    """
    from argcomplete.completers import ChoicesCompleter, FilesCompleter

    for action in parser._actions:
        said = str(action.metavar)  # {none,backbone}
        words: Any = (
            said[1:-1].split(",") if said.startswith("{") else list(action.choices or known.get(action.dest, ()))
        )
        action.completer = ChoicesCompleter(words) if words else FilesCompleter()
        if action.dest == "config":
            action.completer = _words_and_files(words)


def _words_and_files(words: Iterable[str]) -> Callable[..., list[str]]:
    from argcomplete.completers import FilesCompleter

    files = FilesCompleter()
    return lambda prefix, **_: [*(word for word in words if word.startswith(prefix)), *files(prefix)]
