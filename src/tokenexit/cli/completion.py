"""Completion: the script that a shell reads once, and the answer each time it asks what may follow on a line.

The script runs the program anew at every press of Tab, with the line in the environment. No script knows the options,
so none goes stale: the command on the line makes its parser as always, and that answers instead of parsing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from tokenexit.cli.options import asked_by_shell, command_parser


def completion(arguments: list[str]) -> int:
    parser = command_parser("completion", "Print a script by which a shell completes commands, options and files.")
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="that reads it at its start")
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
    parser.add_argument("command", choices=commands)
    parser.add_argument("--version", action="store_true")
    parser.parse_args([])


def complete_values(parser: Any) -> None:
    """Complete what jsonargparse's options take: the words that its help says, else files."""
    from argcomplete.completers import ChoicesCompleter, FilesCompleter

    for action in parser._actions:
        said = str(action.metavar)  # {none,backbone}
        words = dict.fromkeys(said[1:-1].split(","), "")
        action.completer = ChoicesCompleter(words) if said.startswith("{") else FilesCompleter()
