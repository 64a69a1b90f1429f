"""A pytest plugin: every n-th test, so that several processes share them.

Owns: the option --share i/n, the i-th of n shares. Tests that follow each other compile different
kernels of about the same cost, so they are dealt out in turn.
"""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--share", default="0/1")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    first, step = map(int, config.getoption("share").split("/"))
    items[:] = items[first::step]
