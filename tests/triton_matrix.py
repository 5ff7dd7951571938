"""The tests of the Triton kernels with other versions of Triton: `make test-triton-matrix`.

python -m tests.triton_matrix                                  one version of each minor release
python -m tests.triton_matrix 3.2.0 3.6.0                      some
python -m tests.triton_matrix 3.2.0 --with torch==2.6.0+cpu    another PyTorch too, from wherever pip finds it
python -m tests.triton_matrix --pytest "-q -k affine"          some tests
"""

from __future__ import annotations

import sys
import tempfile

from tests.version_matrix import ROOT, parser, report, tested

VERSIONS = ("3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0")
OLD_NUMPY = "numpy<2.4"  # for Triton before 3.7, whose interpreter takes arrays of one number for numbers
SHOW = "import torch, triton, numpy; print(f'torch {torch.__version__}, numpy {numpy.__version__}')"


def main() -> int:
    arguments = parser(__doc__, VERSIONS).parse_args()
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "kernels").glob("test_triton*.py"))

    def test(version: str) -> str:
        requirements = [f"triton=={version}", *arguments.others]
        if tuple(map(int, version.split(".")[:2])) < (3, 7):
            requirements.append(OLD_NUMPY)
        with tempfile.TemporaryDirectory() as cache:
            pytest = [*arguments.pytest, *files]
            return tested(f"triton {version}", requirements, SHOW, pytest, TRITON_CACHE_DIR=cache)

    return report("triton", arguments.versions, test)


if __name__ == "__main__":
    sys.exit(main())
