import json

import pytest

from megatron_lowbit import whole_file
from megatron_lowbit.errors import ConfigError


def test_replaces_what_there_was(tmp_path):
    path = tmp_path / "a"
    for content in (b"one", b"two"):
        whole_file.write(path, content, "plan")
        assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_says_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is a folder or a device"):
        whole_file.write(tmp_path, b"", "plan")
    with pytest.raises(ConfigError, match="plan .*/none/a cannot be written"):
        whole_file.write(tmp_path / "none" / "a", b"", "plan")


def test_a_failure_leaves_what_there_was(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(ConfigError, match="disk full"):
        whole_file.write(path, b"after", "plan")
    assert path.read_bytes() == b"before" and [each.name for each in tmp_path.iterdir()] == ["a"]


def test_json_has_no_word_for_what_is_not_finite():
    found = {"a": [float("nan"), (float("-inf"), 1.5)], "b": {"c": float("inf"), "d": "NaN", "e": None, "f": 2}}
    read = json.loads(whole_file.as_json(found), parse_constant=pytest.fail)
    assert read == {"a": [None, [None, 1.5]], "b": {"c": None, "d": "NaN", "e": None, "f": 2}}
