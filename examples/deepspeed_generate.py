"""Text from a model that DeepSpeed shards, with compressed communication switched on by one call.

    torchrun --nproc-per-node 2 examples/deepspeed_generate.py --comm int8:g128
    deepspeed --num_gpus 2 examples/deepspeed_generate.py --model ~/models/Llama-3.2-1B --prompt "Once upon a time"

Without --comm it is an ordinary script. An engine that exists already is enabled by

    handle = lowbit.patches.deepspeed.enable(engine, config)    # and handle.disable()
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_lowbit as lowbit


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model", help="a Hugging Face folder")
    parser.add_argument("--prompt", default="The old house stood alone upon the hill, and")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--comm", metavar="SPEC", help="such as int8:g128; default: uncompressed")
    parser.add_argument("--local_rank", type=int, help="DeepSpeed's launcher gives it; LOCAL_RANK says the same")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun, such as torchrun --nproc-per-node 2 examples/deepspeed_generate.py")
    return args


def main() -> None:
    args = parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", use_safetensors=True)
    config = lowbit.CommConfig(args.comm, min_bytes=0) if args.comm else None
    engine = lowbit.patches.deepspeed.init_inference(model, tp_size=dist.get_world_size(), config=config)  # the call
    inputs = tokenizer(args.prompt, return_tensors="pt").to(engine.module.device)
    tokens = engine.module.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=0)
    if dist.get_rank() == 0:
        print(f"{tokenizer.decode(tokens[0], skip_special_tokens=True)}\n")
        for site, sent in lowbit.stats().items():
            print(f"{site:20} {sent['bytes_sent']:9} bytes sent, {sent['bytes_bf16']:9} in bf16, {sent['paths']}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
