"""Text from a model that Megatron-Core runs, with compressed communication switched on by two lines.

    torchrun --nproc-per-node 2 examples/megatron_generate.py --lowbit-comm int8:g128 --lowbit-comm-min-bytes 0
    torchrun --nproc-per-node 4 examples/megatron_generate.py --model ~/models/Llama-3.2-1B --prompt "Once upon a time"

Without --lowbit-comm it is an ordinary script. With Megatron-LM, which parses arguments and builds the model by itself,
the same two lines are

    initialize_megatron(extra_args_provider=megatron_core.add_lowbit_args)    # newer: parse_and_validate_args(...)
    megatron_core.enable_from_args(get_args())                                # before get_model(...)
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit.engines.base import Sampling
from megatron_lowbit.engines.megatron import MegatronEngine
from megatron_lowbit.patches import megatron_core


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model", help="a Hugging Face folder")
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--tensor-model-parallel-size", type=int, help="default: all ranks")
    megatron_core.add_lowbit_args(parser)  # the first line
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun, such as torchrun --nproc-per-node 2 examples/megatron_generate.py")
    args.tensor_model_parallel_size = args.tensor_model_parallel_size or int(os.environ["WORLD_SIZE"])
    return args


def main() -> None:
    args = parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    megatron_core.enable_from_args(args)  # the second line; the model is built after it
    engine = MegatronEngine(args.model, args.tensor_model_parallel_size)
    prompts = args.prompt or ["The old house stood alone upon the hill, and"]
    generations = engine.generate(prompts, Sampling(max_new_tokens=args.max_new_tokens))
    if dist.get_rank() == 0:
        for generation in generations:
            print(f"{generation.prompt}{generation.text}\n")
        for site, sent in lowbit.stats().items():
            print(f"{site:20} {sent['bytes_sent']:9} bytes sent, {sent['bytes_bf16']:9} in bf16, {sent['paths']}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
