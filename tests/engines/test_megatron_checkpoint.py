"""Checkpoints that `convert` writes load into the model that their flags describe, and compute what they did before."""

import argparse
import dataclasses
import shutil

import pytest
import torch

from megatron_lowbit.engines.hf_model import Checkpoint, read_config
from megatron_lowbit.engines.megatron_checkpoint import MegatronCheckpoint, verify, write, write_hf
from megatron_lowbit.engines.megatron_flags import Layout, arguments, command_line, limits
from megatron_lowbit.engines.weights import weights
from megatron_lowbit.errors import ModelError
from tests.models import FAMILIES, random_model
from tests.ranks import run_ranks

IDS = torch.arange(48).view(2, 24) * 37 % 61
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
SMALL = {"factor": 32.0, "original_max_position_embeddings": 32}  # so few positions that all three bands are there
ROPES = {
    "3.1": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0},
    "3.2": LLAMA3 | SMALL | {"rope_type": "llama3", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5000.0},
}


def silent(name):
    pass


def convert(folder, layout, out=None):
    config = read_config(folder)
    out = out or folder.with_name(f"{folder.name}-megatron")
    write(config, Checkpoint(folder, config), out, layout, silent)
    return out


def from_flags(words):
    """Megatron-LM's parsing in short: flags -> the fields of a TransformerConfig, and the rest."""
    said, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            said[name] = True
        else:
            said[name] = word if said[name] is True else f"{said[name]} {word}"
    return said


def megatron_logits(rank, world, folders):
    """Build from megatron_args.txt with Megatron-Core alone, load this rank's file strictly, compute."""
    import torch.nn.functional as F

    from megatron_lowbit.engines.megatron import init_tensor_parallel, quiet
    from megatron_lowbit.engines.megatron_layers import layer_spec
    from megatron_lowbit.patches import megatron_cpu

    megatron_cpu.enable()
    init_tensor_parallel(world)
    found = {}
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).triu(1)
    with quiet(), torch.inference_mode(), torch.serialization.safe_globals([argparse.Namespace]):
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.moe import moe_utils

        moe_utils.te_general_gemm = None
        for name, folder in folders.items():
            said = from_flags(open(f"{folder}/megatron_args.txt").read().split())
            fields = {f.name: f.type for f in dataclasses.fields(TransformerConfig)}
            numbers = {k: v if v is True else _number(v) for k, v in said.items() if k in fields}
            config = TransformerConfig(
                **numbers,
                layernorm_epsilon=float(said["norm_epsilon"]),
                num_moe_experts=int(said["num_experts"]) if "num_experts" in said else None,
                activation_func=F.silu,
                gated_linear_unit=said["swiglu"],
                add_bias_linear="disable_bias_linear" not in said,
                moe_token_dispatcher_type="allgather",
                use_cpu_initialization=True,
                perform_initialization=False,
            )
            state = torch.load(f"{folder}/release/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=True)
            spec = get_gpt_layer_local_spec(config.num_moe_experts, False, config.qk_layernorm, normalization="RMSNorm")
            if "spec" in said:
                assert said["spec"] == "megatron_lowbit.engines.megatron_spec spec"
                spec = layer_spec(read_config(f"{folder}/hf"), rope=True)
            model = GPTModel(
                config,
                spec,
                state["args"].padded_vocab_size,
                int(said["max_position_embeddings"]),
                share_embeddings_and_output_weights="untie_embeddings_and_output_weights" not in said,
                position_embedding_type=said["position_embedding_type"],
                rotary_base=int(said["rotary_base"]),
                rope_scaling="use_rope_scaling" in said,  # as scripts do it: with Megatron's own numbers
            ).eval()
            model.load_state_dict(state["model"], strict=True)
            found[name] = model(IDS, positions, mask, runtime_gather_output=True)[..., :61].clone()
    return found


def _number(text):
    try:
        return float(text) if "." in text or "e-" in text else int(text)
    except ValueError:
        return text


def test_a_model_built_from_the_flags_computes_the_same(tmp_path):
    folders, expected = {}, {}
    cases = {family: (family, {}) for family in FAMILIES}
    cases["gemma2"] = ("gemma2", {"final_logit_softcapping": None})  # no spec reaches the logits
    cases |= {f"llama-{name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()}
    for name, (family, changes) in cases.items():
        model = random_model(family, **changes)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected[name] = model(IDS).logits
        folders[name] = str(convert(tmp_path / name, Layout(2)))
    flags = {name: open(f"{folder}/megatron_args.txt").read() for name, folder in folders.items()}
    assert [name for name in flags if "--use-rope-scaling" in flags[name]] == ["llama-3.1"]
    for logits in run_ranks(2, megatron_logits, folders):
        differences = {name: (logits[name] - expected[name]).abs().max().item() for name in folders}
        assert max(differences.values()) < 1e-4, differences


def staged_logits(rank, world, folders):
    """Two pipeline stages on two ranks: each loads its file strictly, the first sends the second what it computes."""
    import torch.distributed as dist

    from megatron_lowbit.engines.megatron import quiet
    from megatron_lowbit.engines.megatron_layers import layer_spec
    from megatron_lowbit.patches import megatron_cpu

    megatron_cpu.enable()
    found = {}
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).triu(1)
    with quiet(), torch.inference_mode(), torch.serialization.safe_globals([argparse.Namespace]):
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.models.gpt import GPTModel
        from megatron.core.transformer import TransformerConfig

        parallel_state.initialize_model_parallel(1, 2, create_gloo_process_groups=False)
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
        for name, folder in folders.items():
            model = read_config(f"{folder}/hf")
            state = torch.load(f"{folder}/release/mp_rank_00_{rank:03d}/model_optim_rng.pt", weights_only=True)
            config = TransformerConfig(
                num_layers=model.layers, hidden_size=model.hidden, ffn_hidden_size=model.intermediate,
                num_attention_heads=model.heads, num_query_groups=model.kv_heads, kv_channels=model.head_dim,
                normalization="RMSNorm", layernorm_epsilon=model.norm_eps, gated_linear_unit=True,
                activation_func=torch.nn.functional.silu, add_bias_linear=False, add_qkv_bias=model.family.qkv_bias,
                pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, use_cpu_initialization=True,
                perform_initialization=False,
            )  # fmt: skip
            stage = GPTModel(
                config, layer_spec(model, 2), 128, model.max_positions, pre_process=rank == 0, post_process=rank == 1,
                share_embeddings_and_output_weights=model.tied, position_embedding_type="rope",
                rotary_base=model.rope_theta,
            ).eval()  # fmt: skip
            stage.load_state_dict(state["model"], strict=True)
            if rank == 0:
                dist.send(stage(IDS, positions, mask).contiguous(), 1)
                found[name] = torch.zeros(1)
            else:
                hidden = torch.empty(IDS.shape[1], IDS.shape[0], model.hidden)
                dist.recv(hidden, 0)
                stage.set_input_tensor(hidden)
                found[name] = stage(IDS, positions, mask)[..., :61].clone()
    return found


@pytest.mark.slow
def test_stages_compute_what_one_model_does(tmp_path):
    folders, expected = {}, {}
    for family, changes in {
        "qwen2": {"tie_word_embeddings": True},
        "gemma2": {"final_logit_softcapping": None},
    }.items():
        model = random_model(family, **changes)
        model.save_pretrained(tmp_path / family)
        with torch.no_grad():
            expected[family] = model(IDS).logits
        folders[family] = str(convert(tmp_path / family, Layout(1, 2)))
    logits = run_ranks(2, staged_logits, folders)[1]
    assert max((logits[name] - expected[name]).abs().max().item() for name in folders) < 1e-4


# --- files: nothing below needs Megatron or ranks ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        random_model(family).save_pretrained(root / family)
    random_model("qwen2", tie_word_embeddings=True, num_key_value_heads=1).save_pretrained(root / "tied")
    return root


@pytest.mark.parametrize("name", [*FAMILIES, "tied"])
@pytest.mark.parametrize("layout", [Layout(1, dtype="bfloat16"), Layout(2, 2), Layout(4, divisible_by=1)])
def test_there_and_back(folders, tmp_path, name, layout):
    config = read_config(folders / name)
    checkpoint = Checkpoint(folders / name, config)
    write(config, checkpoint, tmp_path / "megatron", layout, silent)
    seen = []
    assert verify(config, checkpoint, tmp_path / "megatron", seen.append) == len(set(seen))
    megatron = MegatronCheckpoint(tmp_path / "megatron")
    assert (megatron.tp, megatron.pp) == (layout.tp, layout.pp)
    assert megatron.args.padded_vocab_size == {128: 128 * layout.tp, 1: 64}[layout.divisible_by]
    write_hf(config, megatron, tmp_path / "back", silent, shard=4096)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    again = Checkpoint(tmp_path / "back", read_config(tmp_path / "back"))
    assert str(again.dtype) == f"torch.{layout.dtype}" and read_config(tmp_path / "back") == config
    for weight in weights(config):
        for tensor in weight.sources:
            assert torch.equal(again.read(tensor), checkpoint.read(tensor).to(again.dtype))


def test_stages_number_their_layers_from_zero(folders, tmp_path):
    out = convert(folders / "tied", Layout(1, 2), tmp_path / "m")
    megatron = MegatronCheckpoint(out)
    first, last = ({n for n, _ in state["model"].items()} for state in megatron._states.values())
    assert sorted(path.name for path in (out / "release").iterdir()) == ["mp_rank_00_000", "mp_rank_00_001"]
    assert {n for n in first ^ last} == {
        "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"
    }  # fmt: skip
    assert all("layers.0." in name for name in first & last)


def test_transformer_engine_keeps_norms_with_the_linear_layers_behind_them(folders, tmp_path):
    """Names as in Megatron-Core's own specs, whose sharded_state_dict_keys_map says the same."""
    for family, fused in {"llama": True, "mixtral": False}.items():
        out = convert(folders / family, Layout(2, implementation="transformer_engine"), tmp_path / family)
        names = MegatronCheckpoint(out)._states[0, 0]["model"].keys()
        assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
        assert ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names) == fused
        assert ("decoder.layers.0.pre_mlp_layernorm.weight" in names) != fused
        config = read_config(folders / family)
        assert verify(config, Checkpoint(folders / family, config), out, silent) > 10


def test_nothing_but_tensors_and_plain_values(folders, tmp_path):
    out = convert(folders / "llama", Layout(2), tmp_path / "m")
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(out / "release/mp_rank_01/model_optim_rng.pt", weights_only=True)
    assert state.keys() == {"args", "checkpoint_version", "iteration", "model"}
    assert all(type(value) in (int, float, str, bool) for value in vars(state["args"]).values())
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"


# --- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.fixture
def converted(folders, tmp_path):
    config = read_config(folders / "llama")
    write(config, Checkpoint(folders / "llama", config), tmp_path / "m", Layout(2), silent)
    return tmp_path / "m"


def spoil(folder, change, rank=1):
    path = folder / f"release/mp_rank_{rank:02d}/model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, weights_only=True)
    change(state["model"])
    torch.save(state, path)


def one_bit(model):
    model["decoder.layers.1.mlp.linear_fc2.weight"].view(torch.int32)[3, 5] ^= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_bit, r"layers\.1\.mlp\.down_proj\.weight is not the model's"),
        (
            lambda m: m["decoder.layers.0.input_layernorm.weight"].neg_(),
            "input_layernorm.weight is not the same on all",
        ),
        (lambda m: m.pop("output_layer.weight"), "stage 0 has no 'output_layer.weight'"),
        (lambda m: m.update(extra=torch.ones(1)), "holds extra, which a Llama with its config.json lacks"),
    ],
)
def test_verify_finds_what_differs(folders, converted, change, message):
    spoil(converted, change)
    config = read_config(folders / "llama")
    with pytest.raises(ModelError, match=message):
        verify(config, Checkpoint(folders / "llama", config), converted, silent)


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_a_pickle_is_never_run(converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": Evil(), "model": {}}, converted / "release/mp_rank_00/model_optim_rng.pt")
    with pytest.raises(ModelError, match="cannot be read as plain tensors"):
        MegatronCheckpoint(converted)
    assert not (tmp_path / "evil").exists()


def test_folders_that_are_no_checkpoints(converted, tmp_path):
    with pytest.raises(ModelError, match="nowhere has no latest_checkpointed_iteration.txt"):
        MegatronCheckpoint(tmp_path / "nowhere")
    (converted / "release/mp_rank_01/model_optim_rng.pt").unlink()
    with pytest.raises(ModelError, match="mp_rank_01.* cannot be read"):
        MegatronCheckpoint(converted)
    (converted / "release/mp_rank_01").rmdir()
    with pytest.raises(ModelError, match="files of TP 1 x PP 1, and was made for TP 2 x PP 1; convert"):
        MegatronCheckpoint(converted)
    shutil.rmtree(converted / "release")
    with pytest.raises(ModelError, match=r'release has no mp_rank_\* folders; only the "torch" format is read'):
        MegatronCheckpoint(converted)


def test_flags_and_limits(folders, tmp_path):
    gemma, mistral = read_config(folders / "gemma2"), read_config(folders / "mistral")
    assert "--spec megatron_lowbit.engines.megatron_spec spec" in command_line(gemma, Layout(2), tmp_path)
    assert any("capped at 5.0" in limit for limit in limits(gemma, Layout(2)))
    assert "engines must batch statically" in limits(mistral, Layout(2))[0]
    assert arguments(mistral, Layout(2, implementation="transformer_engine"))["window_size"] == "6,0"
    assert "window_size" not in arguments(mistral, Layout(2))
    assert not limits(read_config(folders / "llama"), Layout(2))
    config = dataclasses.replace(read_config(folders / "llama"), rope_type="llama3", rope=LLAMA3 | {"factor": 32.0})
    assert "--spec" in command_line(config, Layout(2), tmp_path)
    assert "and scripts know only llama3" in limits(config, Layout(2, implementation="transformer_engine"))[0]
    assert not limits(dataclasses.replace(config, rope=LLAMA3), Layout(2))
