"""What sites are called, in every kind of model, and that both routes call them alike and compress each one."""

import sys
from inspect import signature

import pytest
import torch

import megatron_lowbit as lowbit
from tests.megatron_models import BATCH, HIDDEN, LENGTH, VOCAB, Norm, fill, gpt, logits, settings, start, tokens
from tests.ranks import run_ranks

WORLD, SPEC = 2, "int8:g32"


def _parts(*layers, parts=("attention", "mlp")):
    return [f"{layer}.{part}" for layer in layers for part in parts]


def _core_attention():
    """Causal attention in place of DotProductAttention, which does not take MLA's arguments in any release."""
    from megatron.core.transformer.module import MegatronModule

    class CoreAttention(MegatronModule):
        def __init__(self, config, layer_number, attn_mask_type, attention_type, **others):
            super().__init__(config)

        def forward(self, query, key, value, attention_mask, **others):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [sequence, batch, heads, size]
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out.permute(2, 0, 1, 3).flatten(2)

    return CoreAttention


def _mla(sequence_parallel=False):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    multi_latent_attention.HAVE_TE = False  # as it is here, though the module believes otherwise
    sizes = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16}
    config = settings(
        WORLD, kind=MLATransformerConfig, normalization="LayerNorm", rope_type="rope", **sizes,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(multi_latent_attention=True, normalization="LayerNorm")
    spec.submodules.self_attention.submodules.core_attention = _core_attention()
    return gpt(config, spec, position_embedding_type="none")


def _mtp():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    config = settings(WORLD, layers=1, mtp_num_layers=2, mtp_loss_scaling_factor=0.1)
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    return gpt(config, spec, mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False))


def _t5(sequence_parallel=False):
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config, specs = settings(WORLD, layers=1, sequence_parallel=sequence_parallel), []
    for spec in (encoder_model_with_local_spec(), decoder_model_with_local_spec()):
        for name in ("input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm"):
            if getattr(spec.submodules, name) is not IdentityOp:
                setattr(spec.submodules, name, Norm)
        specs.append(TransformerBlockSubmodules([spec], layer_norm=Norm))
    return fill(T5Model(config, config, *specs, vocab_size=VOCAB, max_sequence_length=32).eval())


def _t5_logits(model):
    ids, _, mask = tokens()
    everything = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    return model(ids, ids, everything, mask, everything)


def _bert():
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    config = settings(WORLD, add_bias_linear=True)
    return fill(BertModel(config, 0, bert_layer_local_spec, VOCAB, 32, add_binary_head=False).eval())


def _mixer():
    """Stands in for MambaMixer, whose kernels are not here: its two projections, built with the same arguments."""
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import build_module

    class MambaMixer(MegatronModule):
        def __init__(self, config, submodules, d_model, layer_number=None, **others):
            super().__init__(config)
            group = (others.get("pg_collection") or others["model_comm_pgs"]).tp  # the second until 0.15
            inner = 2 * d_model
            shared = {"config": config, "bias": False, "is_expert": False, "tp_group": group}
            self.in_proj = build_module(
                submodules.in_proj, d_model, 2 * inner, **shared, init_method=config.init_method, gather_output=False,
                skip_bias_add=False, tp_comm_buffer_name="fc1",
            )  # fmt: skip
            self.out_proj = build_module(
                submodules.out_proj, inner, d_model, **shared, init_method=config.output_layer_init_method,
                input_is_parallel=True, skip_bias_add=True, tp_comm_buffer_name="fc2",
            )  # fmt: skip

        def forward(self, hidden_states, inference_context=None, **others):
            z, x = self.in_proj(hidden_states)[0].chunk(2, -1)
            return self.out_proj(x.cumsum(0) * torch.nn.functional.silu(z))

    return MambaMixer


def _hybrid():
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.mamba.mamba_model import MambaModel
    from megatron.core.ssm import mamba_block, mamba_layer, mlp_layer
    from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    sys.modules[mamba_block.MambaStack.__module__].TENorm = Norm  # at the whole stack's end, by name
    layer = get_gpt_layer_local_spec(normalization="LayerNorm").submodules
    mixer = ModuleSpec(_mixer(), submodules=MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear))
    spec = ModuleSpec(
        mamba_block.MambaStack,
        submodules=mamba_block.MambaStackSubmodules(
            mamba_layer=ModuleSpec(
                mamba_layer.MambaLayer,
                submodules=mamba_layer.MambaLayerSubmodules(Norm, mixer, get_bias_dropout_add),
            ),
            attention_layer=ModuleSpec(
                TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=Norm, self_attention=layer.self_attention, self_attn_bda=get_bias_dropout_add
                ),
            ),
            mlp_layer=ModuleSpec(
                mlp_layer.MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=Norm, mlp=layer.mlp, mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )
    config = settings(WORLD, layers=4, sequence_parallel=True)
    return fill(MambaModel(config, spec, VOCAB, 32, hybrid_override_pattern="M*-M").eval())


def _loss(model):
    ids, positions, mask = tokens()
    return model(ids, positions, mask, labels=ids)


MLA_GATHERS = [f"attention.{name}.gather" for name in ("kv_down_proj", "kv_up_proj", "q_down_proj", "q_up_proj")]
T5 = ["encoder.layers.0.attention", "encoder.layers.0.mlp", "layers.0.attention", "layers.0.mlp"]
CASES = {
    "one group of keys": (lambda: gpt(settings(WORLD, num_query_groups=1)), logits, _parts("layers.0", "layers.1")),
    "MLA": (_mla, logits, _parts("layers.0", "layers.1")),
    "MLA, sequence parallel": (
        lambda: _mla(True),
        logits,
        [
            *_parts("layers.0", "layers.1", parts=["attention", "mlp", "mlp.gather", *MLA_GATHERS]),
            "output_layer.gather",
        ],
    ),
    "MTP": (_mtp, _loss, _parts("layers.0", "mtp.0", "mtp.1")),
    "T5": (_t5, _t5_logits, [*T5, "layers.0.cross_attention"]),
    "T5, sequence parallel": (
        lambda: _t5(True),
        _t5_logits,
        [
            *(site + end for site in T5 for end in ("", ".gather")),
            *(f"layers.0.cross_attention{end}" for end in ("", ".q.gather", ".kv.gather")),
            "output_layer.gather",
        ],
    ),
    "BERT": (_bert, lambda model: model(tokens()[0], torch.ones(BATCH, LENGTH))[0], _parts("layers.0", "layers.1")),
    "hybrid": (
        _hybrid,
        logits,
        [
            *(f"layers.{at}{end}" for at in ("0.mamba", "1.attention", "2.mlp", "3.mamba") for end in ("", ".gather")),
            "output_layer.gather",
        ],
    ),
}


@torch.no_grad()
def _every_model(rank, world):
    from megatron_lowbit.patches import megatron_core

    start(world)
    config, results = lowbit.CommConfig(SPEC, min_bytes=0), {}
    for name, (build, run, _) in CASES.items():
        handle = megatron_core.enable(config)
        try:
            model = build()
        except (ImportError, TypeError, ValueError) as error:
            results[name] = {"absent": str(error)}
            continue
        finally:
            handle.disable()
        results[name] = {"while building": list(handle.sites)}
        exact = run(model)
        wrapped = torch.nn.Sequential()
        wrapped.module = model  # as Float16Module and DDP hold a model
        lowbit.reset_stats()
        with megatron_core.enable(config, wrapped) as handle:
            results[name] |= {"built": list(handle.sites), "out": run(model), "exact": exact, "stats": lowbit.stats()}
    inner = torch.nn.Module()
    inner.layers = torch.nn.ModuleList(gpt(settings(WORLD)).decoder.layers)
    results["hybrid MTP"] = []
    if "absent" not in results["MTP"]:
        model = _mtp()
        outer = model.mtp.layers[1]  # a stack of its own, as hybrid models have from 0.17 on
        setattr(outer, "mtp_model_layer" if hasattr(outer, "mtp_model_layer") else "transformer_layer", inner)
        with megatron_core.enable(config, model) as handle:
            handle.verify()
            results["hybrid MTP"] = list(handle.sites)
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(WORLD, _every_model, timeout=300)


ABSENT = {
    "hybrid": "No module named 'transformer_engine'",  # 0.12
    "one group of keys": "must be a multiple of tensor_model",  # up to 0.15
    "MTP": "isinstance() arg 2 must be a type",  # what follows 0.19 asks for a class of Transformer Engine's
}


def _present(result, case):
    if "absent" in result:
        assert ABSENT.get(case, "nothing") in result["absent"]
        pytest.skip(result["absent"])
    return result


@pytest.mark.parametrize("case", list(CASES))
def test_every_kind_of_model_has_its_sites(ranks, case):
    for rank in ranks:
        result = _present(rank[case], case)
        assert sorted(result["while building"]) == sorted(result["built"]) == sorted(CASES[case][-1])


@pytest.mark.parametrize("case", list(CASES))
def test_every_site_is_compressed(ranks, case):
    for rank in ranks:
        result = _present(rank[case], case)
        assert sorted(result["stats"]) == sorted(CASES[case][-1])
        for site, stats in result["stats"].items():
            paths = {"all-gather"} if site.endswith(".gather") else {"one-shot", "reduce-scatter"}
            assert set(stats["paths"]) <= paths and stats["fallbacks"] == {}, site
        assert not torch.equal(result["out"], result["exact"])
        assert (result["out"] - result["exact"]).norm() < 0.1 * result["exact"].norm()


def test_a_stack_within_an_mtp_layer_has_names_of_its_own(ranks):
    stacked = _parts("mtp.1.layers.0", "mtp.1.layers.1")
    for rank in ranks:
        if "absent" not in rank["MTP"]:
            assert {site for site in rank["hybrid MTP"] if site.startswith("mtp.1")} == set(stacked)


@torch.no_grad()
def _stages(rank, world, tp):
    """4 layers in two pipeline stages, and in two chunks of each: names, and what a forward of each sends."""
    from megatron.core import parallel_state

    from megatron_lowbit.patches import megatron_core

    start(tp, pp=2)
    stage, config, results = parallel_state.get_pipeline_model_parallel_rank(), lowbit.CommConfig(SPEC, min_bytes=0), {}
    for chunks in (1, 2):
        with megatron_core.enable(config) as handle:
            model = [_chunk(tp, stage, chunk, chunks) for chunk in range(chunks)]
            names = list(handle.sites)
        lowbit.reset_stats()
        with megatron_core.enable(config, model) as handle:
            for chunk in model:
                if not chunk.pre_process:
                    generator = torch.Generator().manual_seed(1)
                    chunk.set_input_tensor(torch.randn(LENGTH, BATCH, HIDDEN, generator=generator))
                chunk(*tokens())
            results[f"{chunks}"] = [stage, names, list(handle.sites), lowbit.stats()]
    return results


def _chunk(tp, stage, chunk, chunks):
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    virtual = {}
    if chunks == 2:
        virtual = {"virtual_pipeline_model_parallel_size": 2}
        parallel_state.set_virtual_pipeline_model_parallel_world_size(2)  # what releases before 0.15 look at
        parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
    config = settings(tp, layers=4, pipeline_model_parallel_size=2, **virtual)
    options = {"pre_process": stage == chunk == 0, "post_process": stage == 1 and chunk == chunks - 1}
    if "vp_stage" in signature(GPTModel).parameters:
        options["vp_stage"] = chunk if chunks == 2 else None
    return gpt(config, **options)


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_layers_are_counted_through_all_pipeline_stages(tp):
    layers = {("1", 0): (0, 1), ("1", 1): (2, 3), ("2", 0): (0, 2), ("2", 1): (1, 3)}
    for result in run_ranks(2 * tp, _stages, tp, timeout=300):
        for chunks, (stage, while_building, built, stats) in result.items():
            expected = _parts(*(f"layers.{layer}" for layer in layers[chunks, stage]))
            assert sorted(while_building) == sorted(built) == expected
            assert sorted(stats) == (expected if tp > 1 else [])
            assert all(row["paths"] == {"one-shot": 1} for row in stats.values())
