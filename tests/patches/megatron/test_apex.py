"""Which `apex` is taken for NVIDIA's."""

import sys
import warnings

import pytest

from megatron_lowbit.patches.megatron import apex


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    return tmp_path


def test_no_apex_is_fine(folder):
    assert apex.foreign() is None


@pytest.mark.parametrize("name", ["apex.py", "apex/__init__.py"])
def test_another_apex_is_named_with_the_remedy(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("raise ImportError('never imported')")
    with pytest.warns(UserWarning, match=r"apex.* is not NVIDIA's .*: pip uninstall apex") as seen:
        apex.warn_if_foreign()
    assert str(folder / name) in str(seen[0].message)


def test_nvidias_apex_passes(folder):
    (folder / "apex/normalization").mkdir(parents=True)
    for name in ("apex/__init__.py", "apex/normalization/__init__.py"):
        (folder / name).write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apex.warn_if_foreign()
