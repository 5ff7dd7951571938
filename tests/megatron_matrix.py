"""Megatron: patch, engine and launcher, tested with other releases of Megatron-Core: `make test-megatron-matrix`.

    python -m tests.megatron_matrix                            one version of each minor release
    python -m tests.megatron_matrix 0.12.3 0.16.1              some
    python -m tests.megatron_matrix --pytest "-q -k rows"      some tests

Releases that want a newer Python than this one are installed all the same, and tested as far as they can be imported.
"""

from __future__ import annotations

import sys

from tests.version_matrix import ROOT, parser, report, tested

VERSIONS = ("0.12.3", "0.13.1", "0.14.0", "0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.0")
WANTS_3_12 = (0, 17)  # from this release on
SHOW = "import megatron.core; from megatron.core.models.gpt import GPTModel; print(megatron.core.__file__)"


def main() -> int:
    arguments = parser(__doc__, VERSIONS).parse_args()
    folder = ROOT / "tests" / "patches"
    files = sorted(str(file.relative_to(ROOT)) for file in folder.rglob("test_megatron*.py"))
    files += sorted(str(file.relative_to(ROOT)) for file in (folder / "megatron").glob("test_*.py"))
    files += ["tests/engines/test_megatron.py", "tests/engines/test_families.py", "tests/cli/test_run.py"]

    def test(version: str) -> str:
        new = tuple(map(int, version.split(".")[:2])) >= WANTS_3_12 and sys.version_info < (3, 12)
        requirements = [f"megatron-core=={version}", *arguments.others]
        pytest = [*arguments.pytest, *files]
        return tested(f"megatron-core {version}", requirements, SHOW, pytest, python="3.12" if new else None)

    return report("megatron-core", arguments.versions, test)


if __name__ == "__main__":
    sys.exit(main())
