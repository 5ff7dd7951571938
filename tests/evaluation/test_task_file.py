import json
import math

import pytest

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.cases import Case
from megatron_lowbit.evaluation.harness import Scores
from megatron_lowbit.evaluation.task_file import TaskFile

FACTS = {"fingerprint": "f", "task_limit": None}
FOUND = {"one": {"acc": Scores(0.5, [1.0, 0.0], False), "f1": Scores(math.inf, None, False)}}


def case(tp: int = 2) -> Case:
    return Case(CommConfig("int4:g32", min_bytes=0), tp)


def test_goes_on(tmp_path):
    path = tmp_path / "p.tasks.json"
    file = TaskFile(path, FACTS)
    file.add("both", None, FOUND)
    file.add("both", case(), {"one": {}})
    again = TaskFile(path, FACTS)
    assert again.get("both", None) == FOUND and again.get("both", case()) == {"one": {}}
    assert again.get("both", case(4)) is None and again.get("one", None) is None


def test_memory_alone():
    file = TaskFile(None, FACTS)
    file.add("both", None, FOUND)
    assert file.get("both", None) == FOUND


def test_refuses_other_facts(tmp_path):
    path = tmp_path / "p.tasks.json"
    TaskFile(path, FACTS).add("both", None, FOUND)
    with pytest.raises(ConfigError, match="its task_limit is None, now 5"):
        TaskFile(path, FACTS | {"task_limit": 5})


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", json.dumps({"format": 1, "format_version": 1, "facts": {}, "found": []})]
)
def test_refuses_other_files(tmp_path, content):
    path = tmp_path / "p.tasks.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        TaskFile(path, FACTS)
    path.write_text(json.dumps({"format": "x", "format_version": 1, "facts": {}, "found": {}}))
    with pytest.raises(ConfigError, match="no scores of this version"):
        TaskFile(path, FACTS)
