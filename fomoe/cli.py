"""The command line: `fomoe COMMAND ...`.

Owns: the commands and what they share: flags of the model and the engine, errors, the event loop.
Does not know: how anything is done. Each command is a module with `add_arguments(parser)` and
`run(args)`, which may do what needs no event loop and returns the rest as a coroutine.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import io
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

from fomoe.exit_status import exit_status

# Commands are imported when they run, so that `fomoe --help` stays instant.
_COMMANDS = {
    "generate": ("fomoe.commands.generate", "continue a prompt: text to stdout, figures to stderr"),
    "perplexity": ("fomoe.commands.perplexity", "score a text, and compare with exact routing"),
    "bench": ("fomoe.commands.bench", "measure tokens per second, as llama-bench does"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: as exit_status(), or 143 (SIGTERM). Bad usage exits
    with 2.
    """
    return exit_status("fomoe", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args_list = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fomoe",
        description="Runs Mixture-of-Experts models that are far larger than memory.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((a for a in args_list if not a.startswith("-")), None)
    for name, (module_name, help_text) in _COMMANDS.items():
        description = f"{help_text[0].upper()}{help_text[1:]}."
        command = commands.add_parser(
            name, help=help_text, description=description, allow_abbrev=False
        )
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(args_list)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not of UTF-8
    return _run_loop(args.run(args))


def _run_loop(main_task: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main_task)
    result: int = uvloop.run(main_task)
    return result


def _version() -> str:
    from importlib.metadata import version

    return f"fomoe {version('fomoe')}"
