"""DeepSpeed: the patch, tested with other releases of DeepSpeed: `make test-deepspeed-matrix`.

python -m tests.deepspeed_matrix                            one version of each minor release
python -m tests.deepspeed_matrix 0.16.9                     some
python -m tests.deepspeed_matrix --pytest "-q -k rows"      some tests
python -m tests.deepspeed_matrix --with transformers==4.57.6 --with ...    with what that needs, too
"""

from __future__ import annotations

import sys

from tests.version_matrix import ROOT, parser, report, tested

VERSIONS = ("0.16.9", "0.17.6", "0.18.9", "0.19.8")
SHOW = "import deepspeed, transformers; print(deepspeed.__file__, 'with transformers', transformers.__version__)"


def main() -> int:
    arguments = parser(__doc__, VERSIONS).parse_args()
    folder = ROOT / "tests" / "patches"
    files = ["tests/patches/test_deepspeed.py"]
    files += sorted(str(file.relative_to(ROOT)) for file in (folder / "ds").glob("test_*.py"))

    def test(version: str) -> str:
        requirements = [f"deepspeed=={version}", *arguments.others]
        return tested(f"deepspeed {version}", requirements, SHOW, [*arguments.pytest, *files])

    return report("deepspeed", arguments.versions, test)


if __name__ == "__main__":
    sys.exit(main())
