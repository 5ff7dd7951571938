"""Plans with our styles, and plans that do not fit, on real ranks."""

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.errors import ConfigError, LowBitError, ModelError
from megatron_lowbit.patches.tp.installed import WRAPS_FORWARD
from megatron_lowbit.patches.tp.models import blank
from tests import calibrations, planned_models
from tests.ranks import run_ranks

newer = pytest.mark.skipif(not WRAPS_FORWARD, reason="plans of this release take no overrides")
IDS = torch.arange(24).view(2, 12) * 7 % 64
INT8 = lowbit.CommConfig("int8:g32", min_bytes=0)
INT4 = lowbit.CommConfig("int4:g32", min_bytes=0)
FAMILIES = ("qwen3", "phi3", "mixtral")
OPT = {  # what a Llama's plan has; but OPT's attention views what a rank holds as all of the model's heads
    "model.decoder.layers.*.self_attn.q_proj": "colwise",
    "model.decoder.layers.*.self_attn.k_proj": "colwise",
    "model.decoder.layers.*.self_attn.v_proj": "colwise",
    "model.decoder.layers.*.self_attn.out_proj": "rowwise",
    "model.decoder.layers.*.fc1": "colwise",
    "model.decoder.layers.*.fc2": "rowwise",
}

RIGHT = {  # a Llama-like MLP that gathers in between, as Phi-3's does
    "model.layers.*.mlp.gate_proj": "colwise_gather_output",
    "model.layers.*.mlp.up_proj": "colwise_gather_output",
    "model.layers.*.mlp.down_proj": "rowwise_split_input",
}
WRONG = RIGHT | {"model.layers.*.mlp": "all_reduce"}  # sums what was summed


def config_of(family: str, **changes):
    from transformers import AutoConfig

    kind, own = planned_models.FAMILIES[family]
    return AutoConfig.for_model(kind, **(planned_models.SIZES | own | changes))


def paths() -> dict:
    return {site: dict(counters["paths"]) for site, counters in lowbit.stats().items()}


def _ours(plan: dict) -> dict:
    """Without the model's own rules, which are in it where a release takes a plan for the whole one."""
    return {key: style for key, style in plan.items() if "_lowbit" in style}


@torch.no_grad()
def planned(rank: int, world: int, folder: str) -> dict:
    """Logits under a plan, under a handle that replaces it, behind both, and of Transformers itself."""
    enable, tp_plan = lowbit.patches.transformers.enable, lowbit.patches.transformers.tp_plan
    results = {}
    for family in FAMILIES:
        own = planned_models.load(f"{folder}/{family}", world)
        plan = tp_plan(own.config, INT8)
        model = planned_models.load(f"{folder}/{family}", world, plan)
        result = {"ours": _ours(plan), "own": own(IDS).logits}
        lowbit.telemetry.reset_stats()
        result["planned"], result["paths"] = model(IDS).logits, paths()
        assert own(IDS).logits.equal(result["own"])  # another model, which no plan of ours was for
        with enable(own, INT8):
            result["enabled"] = own(IDS).logits
        with enable(model, INT4):
            result["replaced"] = model(IDS).logits
        assert model(IDS).logits.equal(result["planned"])
        model.lowbit_handle.disable()
        result["disabled"] = model(IDS).logits
        other = planned_models.load(f"{folder}/{family}", world, tp_plan(own.config, INT4))
        result["other plan"], result["other"] = _ours(tp_plan(own.config, INT4)), other(IDS).logits
        results[family] = result
    return results


@newer
def test_styles_compress_what_a_plan_gives_them(tmp_path):
    planned_models.save(tmp_path, *FAMILIES)
    first, second = run_ranks(2, planned, str(tmp_path), timeout=300)
    for family in FAMILIES:
        result = first[family]
        part = "moe.combine" if family == "mixtral" else "mlp"
        assert result["paths"] == {f"layers.{i}.{p}": {"one-shot": 1} for i in range(2) for p in ("attention", part)}
        assert result["planned"].equal(result["enabled"]) and not result["planned"].equal(result["own"])
        assert result["replaced"].equal(result["other"]) and not result["replaced"].equal(result["planned"])
        assert result["disabled"].equal(result["own"])
        assert second[family]["planned"].equal(result["planned"])
        assert set(result["other plan"].values()) == {f"{style}_2" for style in result["ours"].values()}
    assert first["qwen3"]["ours"] == {
        "model.layers.*.self_attn.o_proj": "rowwise_lowbit",
        "model.layers.*.mlp.down_proj": "rowwise_lowbit",
    }
    assert set(first["phi3"]["ours"].values()) == {"rowwise_split_input_lowbit"}
    assert first["mixtral"]["ours"] == {  # and nothing of the experts' own parameters
        "model.layers.*.self_attn.o_proj": "rowwise_lowbit",
        "model.layers.*.mlp.experts": "moe_tp_experts_lowbit",
    }


def _error(call) -> str:
    try:
        return f"no error: {call()}"
    except LowBitError as error:
        return f"{type(error).__name__}: {error}"


def by_hand(rank: int, world: int, folder: str) -> dict:
    """What is said of plans that somebody wrote."""
    from transformers import OPTConfig

    patch = lowbit.patches.transformers
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    opt = OPTConfig(vocab_size=64, num_hidden_layers=3, max_position_embeddings=64, **sizes)
    qwen2 = config_of("qwen2")
    found = {
        "OPT": _error(lambda: patch.tp_plan(opt, INT8, plan=OPT)),
        "wrong": _error(lambda: patch.check_plan(qwen2, WRONG)),
        "size": _error(lambda: patch.check_plan(qwen2, RIGHT, tp_size=3)),
    }
    model = planned_models.load(f"{folder}/qwen2", world, blank(qwen2).tp_plan | RIGHT)
    found["unchecked"] = _error(lambda: patch.enable(model, INT8))
    found["difference"] = patch.check_plan(model.config, RIGHT)
    with patch.enable(model, INT8) as handle:
        found["sites"] = handle.sites
    found["plan"] = patch.tp_plan(qwen2, INT8, plan=RIGHT)
    model = planned_models.load(f"{folder}/qwen2", world, found["plan"])
    found["planned sites"] = model.lowbit_handle.sites
    return found


@newer
def test_checks_plans_that_somebody_wrote(tmp_path):
    planned_models.save(tmp_path, "qwen2")
    found, _ = run_ranks(2, by_hand, str(tmp_path), timeout=300)
    for case in ("OPT", "wrong"):
        assert "ModelError: this plan shards" in found[case] and "wrongly" in found[case], found[case]
    assert "tp_size=3" in found["size"]
    assert "ModelError" in found["unchecked"] and "check_plan" in found["unchecked"]
    assert found["difference"] < 1e-4
    sites = [f"layers.{i}.{part}" for i in range(2) for part in ("attention", "mlp")]
    assert found["sites"] == found["planned sites"] == sites
    assert found["plan"]["model.layers.*.mlp.down_proj"] == "rowwise_split_input_lowbit"
    assert found["plan"]["model.layers.*.mlp.gate_proj"] == "colwise_gather_output"


def early(rank: int, world: int, folder: str) -> str:
    """A plan that names our style before a configuration belongs to it."""
    lowbit.patches.transformers  # noqa: B018 - registers the styles
    plan = {"model.layers.*.mlp.down_proj": "rowwise_lowbit"}
    return _error(lambda: planned_models.load(f"{folder}/qwen2", world, plan))


@newer
def test_a_style_without_a_configuration_says_so(tmp_path):
    planned_models.save(tmp_path, "qwen2")
    first, _ = run_ranks(2, early, str(tmp_path))
    assert "ConfigError" in first and "tp_plan(model_config, config)" in first


@newer
@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "falcon", "gptj"])
def test_models_without_a_plan_are_sent_to_deepspeed(family):
    from transformers import AutoConfig

    with pytest.raises(ModelError, match=r"no tensor-parallel plan for \w+: use DeepSpeed"):
        lowbit.patches.transformers.tp_plan(AutoConfig.for_model(family, num_hidden_layers=1), INT8)


@newer
def test_refuses_what_does_not_fit(monkeypatch):
    tp_plan = lowbit.patches.transformers.tp_plan
    with pytest.raises(ConfigError, match="pass a CommConfig"):
        tp_plan(config_of("llama"), "int8")
    with pytest.raises(ModelError, match=r"has no model\.decoder\.layers.*another model"):
        tp_plan(config_of("llama"), INT8, plan=OPT)
    with pytest.raises(ModelError, match="no parallel style rowise"):
        tp_plan(config_of("llama"), INT8, plan={"model.layers.*.mlp.down_proj": "rowise"})
    with pytest.raises(ConfigError, match="torchrun"):
        tp_plan(config_of("llama"), INT8, plan={"model.layers.*.mlp.down_proj": "rowwise"})
    with pytest.raises(ConfigError, match="selects nothing"):
        tp_plan(config_of("llama"), lowbit.CommConfig("int8", sites=("decoder.*",)))
    calibration = calibrations.random_calibration(("layers.0.attention",), 2, 32, "1/64")
    with pytest.raises(ConfigError, match=r"lacks layers\.0\.mlp"):
        tp_plan(config_of("llama"), lowbit.CommConfig("selective4", calibration=calibration))
    with pytest.raises(ModelError, match="AutoConfig"):
        tp_plan("a folder", INT8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install accelerate"):
        tp_plan(config_of("llama"), INT8)


@pytest.mark.skipif(WRAPS_FORWARD, reason="plans of this release take overrides")
def test_older_releases_say_what_to_do_instead():
    with pytest.raises(ConfigError, match=r"tp_plan='auto', and call .*enable\(model, config\)"):
        lowbit.patches.transformers.tp_plan(config_of("llama"), INT8)
