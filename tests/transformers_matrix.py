"""The Transformers patch, tested with other releases of Transformers: `make test-deepspeed-matrix`.

    python -m tests.transformers_matrix                          one version of each layout of its tensor parallelism
    python -m tests.transformers_matrix 4.57.6 5.16.1            some
    python -m tests.transformers_matrix --pytest "-q -k bias"    some tests

Each release gets the huggingface-hub and tokenizers that it asks for, and what those import.
"""

from __future__ import annotations

import sys

from tests.version_matrix import parser, report, tested

_WEB4 = ("requests", "urllib3", "idna", "certifi", "charset-normalizer")
_WEB5 = ("httpx", "httpcore", "h11", "anyio", "idna", "certifi")
NEEDS = {  # release: huggingface-hub, tokenizers, and what the former imports
    "4.51.3": ("0.36.0", "0.21.4", _WEB4),
    "4.53.3": ("0.36.0", "0.21.4", _WEB4),
    "4.55.4": ("0.36.0", "0.21.4", _WEB4),
    "4.57.6": ("0.36.0", "0.22.2", _WEB4),
    "5.0.0": ("1.5.0", "0.22.2", _WEB5),
    "5.5.4": ("1.8.0", "0.22.2", _WEB5),
    "5.10.4": ("1.8.0", "0.22.2", _WEB5),
    "5.16.1": ("1.8.0", "0.23.1", _WEB5),
    "5.23.0": None,  # those of this environment
}
FILES = ("tests/patches/test_transformers.py", "tests/patches/tp/test_plans.py")
SHOW = "import transformers; from transformers import LlamaForCausalLM; print(transformers.__file__)"


def main() -> int:
    arguments = parser(__doc__, NEEDS).parse_args()

    def test(version: str) -> str:
        requirements = [f"transformers=={version}"]
        if needs := NEEDS.get(version):
            hub, tokenizers, web = needs
            requirements += [f"huggingface-hub=={hub}", f"tokenizers=={tokenizers}", *web]
        requirements += arguments.others
        return tested(f"transformers {version}", requirements, SHOW, [*arguments.pytest, *FILES])

    return report("transformers", arguments.versions, test)


if __name__ == "__main__":
    sys.exit(main())
