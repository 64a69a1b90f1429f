"""What is carried to a machine with a GPU and no registry: one folder, with tools/gpu_check in it.

Owns: what is in it, and how large it may be. Does not know: what is done there. Uses the standard
library, pip and a C compiler.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Not brought by torch, or not by every torch; there only what is missing is installed.
CARRIED = ("gguf", "cffi", "pycparser", "numpy", "jinja2", "markupsafe", "tokenizers", "tqdm",
           "pyyaml", "pytest", "pluggy", "iniconfig", "packaging", "pygments", "hypothesis",
           "sortedcontainers")  # fmt: skip
IMPORTS = {"pyyaml": "yaml"}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux_2_12_x86_64", "manylinux1_x86_64")  # fmt: skip
MOST_BYTES = 64 << 20
# What the tool and the kernels' tests are, beside the packages.
SOURCES = ("pyproject.toml", "tools/gpu_*", "tests/*.py")


def pack(folder: Path, python_version: str) -> str:
    """Build and fetch all of it into the folder; what there is of it then, in words. SystemExit
    where that is more than may be carried."""
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check"]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()  # another version of something would be installed beside its successor
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    platforms = [argument for name in PLATFORMS for argument in ("--platform", name)]
    subprocess.run(
        [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", "--implementation", "cp",
         "--python-version", python_version, *platforms, "-d", folder, *CARRIED],
        check=True,
    )  # fmt: skip
    for pattern in SOURCES:
        for source in ROOT.glob(pattern):
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return described(folder)


def described(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    text = f"{folder}: {total / 2**20:.1f} MiB in {len(files)} files, of {MOST_BYTES >> 20} MiB"
    if total > MOST_BYTES:
        largest = sorted(files, key=lambda path: -path.stat().st_size)[:5]
        names = ", ".join(f"{p.name} ({p.stat().st_size / 2**20:.1f} MiB)" for p in largest)
        raise SystemExit(f"{text}: too much to carry; the largest: {names}")
    return f"{text}\non the GPU's machine: python3 {folder.name}/tools/gpu_check"
