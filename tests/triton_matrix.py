"""The tests of the Triton kernels with other versions of Triton: `make test-triton-matrix`.

    python -m tests.triton_matrix                                  one version of each minor release
    python -m tests.triton_matrix 3.2.0 3.6.0                      some
    python -m tests.triton_matrix 3.2.0 --with torch==2.6.0+cpu    another PyTorch too, from wherever pip finds it
    python -m tests.triton_matrix --pytest "-q -k affine"          some tests

Each version has a virtual environment in the user's cache, half a gigabyte, which is kept. All but what is named here
it borrows from the environment that this runs in.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.test_packaging import ROOT, make_environment

VERSIONS = ("3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0")
OLD_NUMPY = "numpy<2.4"  # for Triton before 3.7, whose interpreter takes arrays of one number for numbers
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-lowbit" / "triton-matrix"


def environment(version: str, others: list[str]) -> Path:
    """The interpreter of an environment with that Triton, made unless it is there."""
    requirements = [f"triton=={version}", *others]
    if tuple(map(int, version.split(".")[:2])) < (3, 7):
        requirements.append(OLD_NUMPY)
    folder = CACHE / "+".join([version, *others]).replace("/", "_")
    done = folder / "requirements.txt"
    text = "\n".join([sys.executable, *requirements])
    if not done.exists() or done.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        executable = make_environment(folder)
        pip = [sys.executable, "-m", "pip", "--python", executable, "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--no-input", "--no-deps", *requirements], check=True)
        done.write_text(text)
    return folder / "bin" / "python"


def tested(version: str, others: list[str], pytest: list[str]) -> str:
    """Run the tests -> what to say of it."""
    try:
        executable = environment(version, others)
    except subprocess.CalledProcessError:
        return "cannot be installed"
    show = "import torch, triton, numpy; print(f'torch {torch.__version__}, numpy {numpy.__version__}')"
    found = subprocess.run([executable, "-c", show], capture_output=True, text=True)
    if found.returncode:
        return found.stderr.strip().splitlines()[-1]
    print(f"triton {version}, {found.stdout.strip()}", flush=True)
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "kernels").glob("test_triton*.py"))
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [executable, "-m", "pytest", "-p", "no:cacheprovider", *pytest, *files],
            cwd=ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": cache},
        )
    return "passed" if done.returncode == 0 else "FAILED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help=f"of Triton; {', '.join(VERSIONS)} by default")
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="REQUIREMENT", help="install too")
    parser.add_argument("--pytest", type=shlex.split, default=["-q"], metavar="ARGUMENTS", help="-q by default")
    arguments = parser.parse_args()
    results = {version: tested(version, arguments.others, arguments.pytest) for version in arguments.versions}
    for version, result in results.items():
        print(f"triton {version:6} {result}")
    return any(result != "passed" for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
