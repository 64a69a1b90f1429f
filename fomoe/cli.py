"""The command line: `fomoe COMMAND ...`.

Owns: the commands and what they share: flags of the model and the engine, errors, the event loop.
Does not know: how anything is done. Each command is a module with `add_arguments(parser)` and
`run(args)`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

from fomoe.errors import FomoeError

# Commands are imported when they run, so that `fomoe --help` stays instant.
_COMMANDS = {
    "generate": ("fomoe.commands.generate", "continue a prompt"),
    "perplexity": ("fomoe.commands.perplexity", "score a text, and compare with exact routing"),
    "bench": ("fomoe.commands.bench", "measure tokens per second, as llama-bench does"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (error), 2 (bad usage) or 130 (Ctrl-C)."""
    args_list = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fomoe",
        description="Runs Mixture-of-Experts models that are far larger than memory.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((a for a in args_list if not a.startswith("-")), None)
    for name, (module_name, help_text) in _COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(args_list)
    try:
        return _run_loop(args.run(args))
    except FomoeError as error:
        print(f"fomoe: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"fomoe: error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


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
