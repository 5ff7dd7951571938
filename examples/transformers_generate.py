"""Text from a model that Transformers shards by itself, with compressed communication switched on by one call.

    torchrun --nproc-per-node 2 examples/transformers_generate.py --comm int8:g128
    torchrun --nproc-per-node 4 examples/transformers_generate.py --model ~/models/Llama-3.2-1B --prompt "Once upon a"

Without --comm it is an ordinary script. Instead of the call, a plan can be given when the model is loaded:

    plan = lowbit.patches.transformers.tp_plan(AutoConfig.from_pretrained(path), config)
    AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2, tp_plan=plan))
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import megatron_lowbit as lowbit


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model", help="a Hugging Face folder")
    parser.add_argument("--prompt", default="The old house stood alone upon the hill, and")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--comm", metavar="SPEC", help="such as int8:g128; default: uncompressed")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun, such as torchrun --nproc-per-node 2 examples/transformers_generate.py")
    return args


def main() -> None:
    args = parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sharded = DistributedConfig(tp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype="auto", use_safetensors=True, distributed_config=sharded
    )
    if args.comm:
        lowbit.patches.transformers.enable(model, lowbit.CommConfig(args.comm, min_bytes=0))  # the call
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=0)
    if dist.get_rank() == 0:
        print(f"{tokenizer.decode(tokens[0], skip_special_tokens=True)}\n")
        for site, sent in lowbit.stats().items():
            print(f"{site:20} {sent['bytes_sent']:9} bytes sent, {sent['bytes_bf16']:9} in bf16, {sent['paths']}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
