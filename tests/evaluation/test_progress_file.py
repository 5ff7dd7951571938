import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.cases import Case
from megatron_lowbit.evaluation.metrics import Tokens
from megatron_lowbit.evaluation.progress_file import Progress

FACTS = {"fingerprint": "abc", "text_sha256": "def"}
ONE, OTHER = Case(CommConfig("int4:g32", min_bytes=0), 2), Case(CommConfig("int4:g32", min_bytes=0), 4)


def tokens(seed=0):
    torch.manual_seed(seed)
    return Tokens(*(torch.rand(5) for _ in range(4)))


def test_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "progress.safetensors"
    with pytest.raises(KeyboardInterrupt), Progress(path, FACTS) as progress:
        progress.add(ONE, 1, tokens(1))
        progress.add(ONE, 0, tokens(0))
        progress.add(OTHER, 0, tokens(2))
        raise KeyboardInterrupt
    again = Progress(path, FACTS)
    assert again.done(ONE, 0) and again.done(ONE, 1) and again.done(OTHER, 0) and not again.done(OTHER, 1)
    assert [found.nll.tolist() for found in again.tokens(ONE)] == [tokens(i).nll.tolist() for i in range(2)]
    assert not list(tmp_path.glob(".*"))


def test_refuses_what_is_of_another_evaluation(tmp_path):
    path = tmp_path / "progress.safetensors"
    with Progress(path, FACTS) as progress:
        progress.add(ONE, 0, tokens())
    with pytest.raises(ConfigError, match="fingerprint is 'abc', now 'xyz'"):
        Progress(path, FACTS | {"fingerprint": "xyz"})
    with safe_open(str(path), "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    for cut, changed in ((dict(list(tensors.items())[:-1]), {}), (tensors, {"cases": "[]"}), (tensors, {"cases": "{"})):
        save_file(cut, path, metadata | changed)
        with pytest.raises(ConfigError, match="is damaged"):
            Progress(path, FACTS)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        Progress(path, FACTS)


def test_without_a_file_nothing_is_written(tmp_path):
    with Progress(None, FACTS) as progress:
        progress.add(ONE, 0, tokens())
        assert progress.done(ONE, 0)
    assert not list(tmp_path.iterdir())


def test_figures_are_copied_out_of_the_way(tmp_path):
    """What is kept lies in one block of memory, and stays what it was; it can be written from there."""
    path = tmp_path / "progress.safetensors"
    given = [tokens(i) for i in range(3)]
    with Progress(path, FACTS) as progress:
        for window, each in enumerate(given):
            progress.add(ONE, window, each)
            each.nll.zero_()
    kept = progress.tokens(ONE)
    assert len({found.nll.untyped_storage().data_ptr() for found in kept}) == 1
    assert [found.nll.tolist() for found in Progress(path, FACTS).tokens(ONE)] == [
        tokens(i).nll.tolist() for i in range(3)
    ]
    assert [len(found) for found in (progress.tokens(ONE, range(1, 9)), progress.tokens(OTHER))] == [2, 0]
