"""What tests/triton_matrix.py and tests/megatron_matrix.py share: environments with another version of one package.

Each has a virtual environment in the user's cache, which is kept. All but what is asked for it borrows from the
environment that this runs in.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.test_packaging import ROOT, make_environment

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-lowbit" / "version-matrix"


def environment(requirements: list[str], python: str | None = None) -> Path:
    """The interpreter of an environment with these packages, made unless it is there.

    python: take the wheels for that version of Python, such as "3.12". Raises CalledProcessError if pip fails.
    """
    folder = CACHE / "+".join(requirements).replace("/", "_")
    done = folder / "requirements.txt"
    text = "\n".join([sys.executable, *requirements])
    if not done.exists() or done.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        executable = make_environment(folder)
        show = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([executable, "-c", show], check=True, capture_output=True, text=True).stdout.strip()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        wheels = ["--only-binary=:all:", "--python-version", python, "--ignore-requires-python"] if python else []
        subprocess.run([*pip, "--no-deps", *wheels, "--target", site, *requirements], check=True)
        done.write_text(text)
    return folder / "bin" / "python"


def tested(name: str, requirements: list[str], show: str, pytest: list[str], python: str | None = None, **env) -> str:
    """Run the tests -> what to say of it. show: code that prints what is there, and fails where it cannot be used."""
    try:
        executable = environment(requirements, python)
    except subprocess.CalledProcessError:
        return "cannot be installed"
    environ = os.environ | env
    found = subprocess.run([executable, "-W", "ignore", "-c", show], capture_output=True, text=True, env=environ)
    if found.returncode:
        return f"cannot be imported: {found.stderr.strip().splitlines()[-1]}"
    print(f"{name}: {found.stdout.strip()}", flush=True)
    done = subprocess.run([executable, "-m", "pytest", "-p", "no:cacheprovider", *pytest], cwd=ROOT, env=environ)
    return "passed" if done.returncode == 0 else "FAILED"


def parser(doc: str, versions: Iterable[str]) -> argparse.ArgumentParser:
    """The options of a matrix."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=list(versions), help=f"{', '.join(versions)} by default")
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="REQUIREMENT", help="install too")
    parser.add_argument("--pytest", type=shlex.split, default=["-q"], metavar="ARGUMENTS", help="-q by default")
    return parser


def report(package: str, versions: Iterable[str], test: Callable[[str], str]) -> int:
    """Test each version and say how it went -> exit code."""
    results = {version: test(version) for version in versions}
    for version, result in results.items():
        print(f"{package} {version:7} {result}")
    return int(any(result != "passed" for result in results.values()))
