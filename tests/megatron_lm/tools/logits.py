"""A script that knows nothing of compression: builds a small GPT as `--build` says, runs it, writes what it saw."""

import json
import os
import sys

import torch
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.training import get_args, initialize_megatron


def extra_args(parser):
    group = parser.add_argument_group(title="logits")
    group.add_argument("--build", default="model", choices=["model", "nothing", "te", "unused"])
    group.add_argument("--out", required=True)
    group.add_argument("--prompts", nargs="+", default=[])
    return parser


def build(args):
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        add_bias_linear=False,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        use_cpu_initialization=True,
        attention_backend=AttnBackend.local,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    if args.build == "te":  # a stand-in for a layer of Transformer Engine's that reduces where nobody reaches
        spec.submodules.mlp.submodules.linear_fc2 = type("TEFusedMLP", (RowParallelLinear,), {})
    model = GPTModel(config, spec, vocab_size=96, max_sequence_length=32, position_embedding_type="rope").eval()
    for index, (_, parameter) in enumerate(model.named_parameters()):
        rank = mpu.get_tensor_model_parallel_rank() if getattr(parameter, "tensor_model_parallel", False) else 0
        if parameter.ndim > 1:
            generator = torch.Generator().manual_seed(100 * index + rank)
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.inference_mode()
def main():
    initialize_megatron(extra_args_provider=extra_args)
    args = get_args()
    result = {"argv": sys.argv, "path": sys.path[0], "prompts": args.prompts, "name": __name__, "file": __file__}
    result["flags"] = {name: value for name, value in vars(args).items() if name.startswith("lowbit")}
    if args.build != "nothing":
        model = build(args)
        ids = torch.arange(14, device="cuda").view(2, 7) * 5 % 96
        mask = torch.ones(1, 1, 7, 7, dtype=torch.bool, device="cuda").triu(1)
        if args.build == "model":
            positions = torch.arange(7, device="cuda").expand_as(ids)
            result["logits"] = model(ids, positions, mask, runtime_gather_output=True).flatten().tolist()
    with open(f"{args.out}.{os.environ['RANK']}", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
