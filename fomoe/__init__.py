"""fomoe: runs Mixture-of-Experts models that are far larger than memory.

async with fomoe.Engine.open("model.gguf", dram="16GiB") as engine:
    async for token in engine.generate("The sea was", max_tokens=64):
        print(token.text, end="", flush=True)
"""

TYPE_CHECKING = False  # what type checkers take it for; typing is slow to import, see fomoe.start
if TYPE_CHECKING:
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

# Where the names are, but those of fomoe.errors. They are imported when they are first asked for:
# the command line, whose modules are of this package too, begins before the engine is there.
_PLACES = {
    "CarOptions": "fomoe.experts.car_options",
    "Engine": "fomoe.engine",
    "EngineOptions": "fomoe.config",
    "MemoryPlan": "fomoe.plan",
    "PhaseStats": "fomoe.stats",
    "Sampling": "fomoe.sampling",
    "Stats": "fomoe.stats",
    "Token": "fomoe.engine",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(_PLACES.get(name, "fomoe.errors")), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
