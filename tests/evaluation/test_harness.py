"""lm_eval's scores against log likelihoods computed here, on the bundled model and questions of the bundled text."""

import json
import socket

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lowbit import simulate
from megatron_lowbit.cli.files import BUNDLED
from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError
from megatron_lowbit.evaluation import harness, local_tasks
from megatron_lowbit.evaluation.cases import Case

TEXT = (BUNDLED / "sample_text.txt").read_text(encoding="utf-8")
NAMES = list(local_tasks.TASKS)
LIMIT = 8


def case(spec: str, tp: int = 8) -> Case:
    return Case(CommConfig(spec, min_bytes=0), tp)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    local_tasks.write(TEXT, NAMES, folder)
    return folder


@pytest.fixture(scope="module")
def tasks(folder):
    manager = harness.manager(NAMES, folder)
    return {name: task for each in NAMES for name, task in harness.load(manager, each).items()}


@pytest.fixture(scope="module")
def subject():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "model", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(BUNDLED / "model")


@pytest.fixture(scope="module")
def asked(subject):
    return harness.Harness(*subject, max_length=512, batch=3)


@pytest.fixture(scope="module")
def exact(asked, tasks):
    return asked.scores(tasks, LIMIT, None)


@torch.inference_mode()
def likelihood(subject, context: str, continuation: str) -> tuple[float, bool]:
    """(log likelihood, whether greedy decoding would say it) of one continuation alone."""
    model, tokenizer = subject
    before = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = torch.tensor(tokenizer(context + continuation, add_special_tokens=False)["input_ids"])
    logits = model(ids[None]).logits[0, before - 1 : -1].log_softmax(-1)
    targets = ids[before:]
    return logits.gather(1, targets[:, None]).sum().item(), bool((logits.argmax(-1) == targets).all())


def test_cloze_by_hand(exact, subject):
    questions = local_tasks.cloze(TEXT)[:LIMIT]
    found = [likelihood(subject, question["context"], question["target"]) for question in questions]
    scores = exact["local_cloze"]
    assert scores["perplexity"].each == pytest.approx([value for value, _ in found], abs=1e-3)
    assert scores["acc"].each == [float(greedy) for _, greedy in found]
    assert scores["acc"].value == sum(scores["acc"].each) / LIMIT
    mean = sum(value for value, _ in found) / LIMIT
    assert scores["perplexity"].value == pytest.approx(torch.tensor(-mean).exp().item(), rel=1e-3)
    assert scores["perplexity"].log and not scores["acc"].log


def test_choice_by_hand(exact, subject):
    rights, normed = [], []
    for question in local_tasks.choice(TEXT)[:LIMIT]:
        choices = question["choices"]
        found = [likelihood(subject, question["context"], f" {each}")[0] for each in choices]
        per_letter = [value / len(each) for value, each in zip(found, choices, strict=True)]
        rights.append(float(found.index(max(found)) == question["label"]))
        normed.append(float(per_letter.index(max(per_letter)) == question["label"]))
    assert exact["local_choice"]["acc"].each == rights
    assert exact["local_choice"]["acc_norm"].each == normed
    assert len(set(rights + normed)) == 2  # else this would say little


def test_passing_values_on_changes_nothing(asked, tasks, exact, monkeypatch):
    sites = []
    reduced = simulate.reduced

    def counted(partials, config, site, nodes):
        assert config.spec == "fp32" and len(partials) == 8
        sites.append(site)
        return reduced(partials, config, site, nodes)

    monkeypatch.setattr(simulate, "reduced", counted)
    found = asked.scores(tasks, LIMIT, case("fp32"))
    assert len(set(sites)) == 12 and sites.count("layers.0.mlp") == sites.count("layers.5.attention") > 8
    for task, metrics in exact.items():
        for metric, scores in metrics.items():
            own = found[task][metric]
            assert own.each == (pytest.approx(scores.each, abs=1e-3) if scores.log else scores.each)
    assert found["local_cloze"]["perplexity"].each != exact["local_cloze"]["perplexity"].each  # sums of another order


def test_a_bad_spec_changes_answers(asked, tasks, exact):
    good, bad = (
        asked.scores(tasks, LIMIT, case(spec))["local_cloze"]["perplexity"] for spec in ("int8:g128", "int2:g32:sym")
    )
    off = [
        max(abs(a - b) for a, b in zip(run.each, exact["local_cloze"]["perplexity"].each, strict=True))
        for run in (good, bad)
    ]
    assert off[0] < 0.15 and off[1] > 0.8
    again = asked.scores(tasks, LIMIT, None)
    assert again == exact  # nothing is left of the compression


def test_what_is_not_finite_is_said(asked, tasks, monkeypatch, subject):
    reduced = simulate.reduced

    def broken(partials, config, site, nodes):
        total = reduced(partials, config, site, nodes)
        return total * float("nan") if site == "layers.2.mlp" else total

    monkeypatch.setattr(simulate, "reduced", broken)
    with pytest.raises(ModelError, match=r"int8:g128, TP=8: .* not finite; it began at layers\.2\.mlp"):
        asked.scores(tasks, 1, case("int8:g128"))
    with (
        subject[0].lm_head.register_forward_hook(lambda *call: call[-1] / 0),
        pytest.raises(ModelError, match="own logits"),
    ):
        asked.scores(tasks, 1, None)


def test_text_that_is_generated_is_simulated_and_checked(asked, folder, tmp_path, monkeypatch):
    """lm_eval never sees these logits: of what is not finite greedy decoding would make the first token."""
    data = {"data_files": {"test": str(folder / "local_cloze.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    how = {"until": ["\n"], "max_gen_toks": 2, "do_sample": False}
    task = {"task": "spoken", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    task |= {"output_type": "generate_until", "doc_to_text": "context", "doc_to_target": "target"}
    task |= {"generation_kwargs": how, "metric_list": [{"metric": "exact_match"}], "metadata": {"version": 1.0}}
    (tmp_path / "spoken.yaml").write_text(json.dumps(task))
    from lm_eval.tasks import TaskManager

    tasks = harness.load(TaskManager(include_path=str(tmp_path), include_defaults=False), "spoken")
    sites, reduced = [], simulate.reduced
    monkeypatch.setattr(simulate, "reduced", lambda *given: sites.append(given[2]) or reduced(*given))
    found = asked.scores(tasks, LIMIT, case("int8:g128"))
    assert len(found["spoken"]["exact_match"].each) == LIMIT and len(set(sites)) == 12
    monkeypatch.setattr(simulate, "reduced", lambda *given: reduced(*given) * float("nan"))
    with pytest.raises(ModelError, match=r"int8:g128, TP=8: .* not finite; it began at layers\.0\.attention"):
        asked.scores(tasks, 2, case("int8:g128"))


def test_what_lm_eval_does_not_manage_is_said(asked, tasks, monkeypatch):
    def fails(*arguments, **options):
        raise KeyError("gold")

    monkeypatch.setattr("lm_eval.evaluator.evaluate", fails)
    with pytest.raises(ModelError, match=r"lm_eval fails at local_cloze, local_choice \(KeyError: 'gold'\)"):
        asked.scores(tasks, 1, None)


def own_task(folder, name: str, **settings):
    """A task that generates, in a folder of its own -> lm_eval's manager."""
    from lm_eval.tasks import TaskManager

    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"q": f"He said that {word}", "a": "it was"}) + "\n" for word in "ab"))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "q"}
    task |= {"output_type": "generate_until", "doc_to_target": "a", "generation_kwargs": {"max_gen_toks": 3}}
    task |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    (folder / f"{name}.yaml").write_text(json.dumps(task | settings))
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_tasks_that_generate(asked, tmp_path):
    tasks = harness.load(own_task(tmp_path, "spoken"), "spoken")
    for run in (None, case("int8:g128")):
        scores = asked.scores(tasks, None, run)["spoken"]["exact_match"]
        assert len(scores.each) == 2 and scores.value == sum(scores.each) / 2


def test_code_is_not_run_unasked(tmp_path):
    manager = own_task(tmp_path, "coded", unsafe_code=True)
    with pytest.raises(ConfigError, match="coded runs code that the model writes"):
        harness.load(manager, "coded")
    assert list(harness.load(manager, "coded", unsafe=True)) == ["coded"]


def test_data_that_is_not_there(tmp_path):
    manager = own_task(tmp_path, "lost", dataset_kwargs={"data_files": {"test": str(tmp_path / "none.jsonl")}})
    with pytest.raises(ConfigError, match=r"the task lost cannot be loaded \(FileNotFoundError"):
        harness.load(manager, "lost")


def test_a_group_is_its_tasks(folder, tmp_path):
    from lm_eval.tasks import TaskManager

    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": NAMES}))
    manager = TaskManager(include_path=[str(folder), str(tmp_path)], include_defaults=False)
    assert sorted(harness.load(manager, "both")) == sorted(NAMES)
