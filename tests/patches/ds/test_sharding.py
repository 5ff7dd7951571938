"""init_inference: its arguments, groups of ranks, and what DeepSpeed makes of a model."""

import json

import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from tests.llama import tiny_llama
from tests.patches.ds.engines import paths, tokens
from tests.ranks import run_ranks

INT8 = {"spec": "int8:g32", "min_bytes": 0}


def _message(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except lowbit.LowBitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def arguments(rank: int, world: int, folder: str) -> dict:
    from deepspeed.inference.engine import InferenceEngine
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    init, config = lowbit.patches.deepspeed.init_inference, lowbit.CommConfig(**INT8)
    file = f"{folder}/config.json"
    with open(file, "w") as out:
        json.dump({"tensor_parallel": {"tp_size": 2}}, out)
    say = {
        "3 of 2 ranks": _message(init, tiny_llama(), 3, config),
        "4 of 2 ranks": _message(init, tiny_llama(), 4, config),
        "0": _message(init, tiny_llama(), 0, config),
        "text": _message(init, tiny_llama(), "2", config),
        "true": _message(init, tiny_llama(), True, config),
        "not a config": _message(init, tiny_llama(), 2, "int8"),
        "no model": _message(init, "llama", 2, config),
        "tp twice": _message(init, tiny_llama(), 2, config, tensor_parallel={"tp_size": 2}),
        "mp twice": _message(init, tiny_llama(), 2, config, mp_size=2),
        "tp in config": _message(init, tiny_llama(), 2, config, deepspeed_config={"tensor_parallel": {"tp_size": 2}}),
        "tp in a file": _message(init, tiny_llama(), 2, config, deepspeed_config=file),
        "no file": _message(init, tiny_llama(), 2, config, deepspeed_config=f"{folder}/none.json"),
        "whole numbers": _message(init, tiny_llama(), 2, config, dtype=torch.int16),
        "dtype": _message(init, tiny_llama().double(), 2, config),
        "tp 1": _message(init, tiny_llama(), 1, config),
    }
    settings = {"dtype": torch.float32}
    engine = init(tiny_llama(), 2, None, deepspeed_config=settings)
    assert list(settings) == ["dtype"]
    say["sharded twice"] = _message(init, engine, 2, config)
    say["model sharded twice"] = _message(init, engine.module, 2, config)

    own = {LlamaDecoderLayer: ("mlp.down_proj", "self_attn.o_proj")}
    given = init(tiny_llama().bfloat16(), 2, config, injection_policy=own)
    assert given.injection_dict == own
    with torch.no_grad():
        given(tokens())
    assert {parameter.dtype for parameter in given.module.parameters()} == {torch.bfloat16}
    assert InferenceEngine.inference_mp_group is None
    single = init(tiny_llama(), 1, None)
    assert single.lowbit_handle is None
    try:  # DeepSpeed's own check, as these two exclude each other
        init(tiny_llama(), 2, config, injection_policy=own, replace_with_kernel_inject=True)
    except AssertionError as error:
        say["kernels and policy"] = str(error)
    return {"say": say, "paths": paths()}


def test_arguments(tmp_path):
    first = run_ranks(2, arguments, str(tmp_path))[0]
    say = first["say"]
    for ranks in (3, 4):
        assert f"tp_size={ranks} does not divide the 2 ranks of this job" in say[f"{ranks} of 2 ranks"]
    for wrong in ("0", "text", "true"):
        assert "give the number of ranks that share the model" in say[wrong]
    assert say["not a config"].startswith("ConfigError: config is 'int8'")
    assert say["no model"].startswith("ModelError: model is 'llama'")
    for twice in ("tp twice", "mp twice", "tp in config", "tp in a file"):
        assert "beside tp_size=2: leave it out" in say[twice]
    assert "DeepSpeed does not run int16 on cpu: give another dtype" in say["whole numbers"]
    assert "none.json' cannot be read as JSON" in say["no file"]
    assert (
        "ConfigError: DeepSpeed does not run float64 on cpu: give another dtype, of float32, bfloat16" in say["dtype"]
    )
    assert say["tp 1"].endswith("for tp_size 1: pass what deepspeed.init_inference returned for 2 ranks or more")
    assert "is sharded by DeepSpeed already" in say["sharded twice"]
    assert "is sharded by DeepSpeed already" in say["model sharded twice"]
    assert "kernel injection" in say["kernels and policy"]
    sites = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]
    assert first["paths"] == {site: {"one-shot": 1} for site in sites}


def sizes(rank: int, world: int) -> dict:
    """Engines of 4 and of 2 ranks, one after the other and in turns."""
    init = lowbit.patches.deepspeed.init_inference
    model = tiny_llama(num_key_value_heads=4)
    with torch.no_grad():
        whole = model(tokens()).logits
        four = init(tiny_llama(num_key_value_heads=4), 4, lowbit.CommConfig(**INT8))
        two = init(tiny_llama(num_key_value_heads=4), 2, lowbit.CommConfig("fp32", min_bytes=0))
        again = init(tiny_llama(num_key_value_heads=4), 4, lowbit.CommConfig("fp32", min_bytes=0))
        results = [engine(tokens()).logits for engine in (two, again, four)]
    groups = [engine.module.model.layers[0].mlp.down_proj.mp_group for engine in (two, again, four)]
    assert groups[1] is groups[2]
    return {
        "errors": [float((result - whole).abs().max()) for result in results],
        "ranks": [dist.get_process_group_ranks(group) for group in groups],
    }


def test_engines_of_two_sizes():
    results = run_ranks(4, sizes)
    for rank, result in enumerate(results):
        two, again, compressed = result["errors"]
        assert max(two, again) < 1e-5 < compressed < 0.3
        assert result["ranks"] == [[rank // 2 * 2, rank // 2 * 2 + 1], [0, 1, 2, 3], [0, 1, 2, 3]]
