"""The small trained model that comes with the package.

Owns: where it lies. Does not know: what is in it.
"""

from pathlib import Path

DEMO_MODEL = Path(__file__).with_name("books-moe.gguf")
"""A GGUF file of architecture qwen35moe, 20.5 MB; README.md beside it says what it is."""
