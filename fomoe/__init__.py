"""fomoe: runs Mixture-of-Experts models that are far larger than memory.

async with fomoe.Engine.open("model.gguf", dram="16GiB") as engine:
    async for token in engine.generate("The sea was", max_tokens=64):
        print(token.text, end="", flush=True)
"""

from fomoe.config import EngineOptions
from fomoe.engine import Engine, Token
from fomoe.errors import (
    BudgetError,
    ClosedError,
    FomoeError,
    FormatError,
    ReadError,
    RequestError,
    UnsupportedError,
)
from fomoe.experts.car_options import CarOptions
from fomoe.plan import MemoryPlan
from fomoe.sampling import Sampling
from fomoe.stats import PhaseStats, Stats

__all__ = [
    "BudgetError",
    "CarOptions",
    "ClosedError",
    "Engine",
    "EngineOptions",
    "FomoeError",
    "FormatError",
    "MemoryPlan",
    "PhaseStats",
    "ReadError",
    "RequestError",
    "Sampling",
    "Stats",
    "Token",
    "UnsupportedError",
]
