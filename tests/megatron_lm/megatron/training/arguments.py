"""Megatron's arguments."""

import argparse
import os

import torch


def get_device_arch_version():
    return torch.cuda.get_device_properties(torch.device("cuda:0")).major


def add_megatron_arguments(parser):
    group = parser.add_argument_group(title="distributed")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--distributed-backend", default="nccl", choices=["nccl", "gloo"])
    return parser


def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = argparse.ArgumentParser(description="Megatron-LM Arguments", allow_abbrev=False)
    parser = add_megatron_arguments(parser)
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    if ignore_unknown_args:
        args, _ = parser.parse_known_args()
    else:
        args = parser.parse_args()
    args.rank = int(os.getenv("RANK", "0"))
    args.world_size = int(os.getenv("WORLD_SIZE", "1"))
    return args


def validate_args(args):
    if args.tensor_model_parallel_size > 1 and get_device_arch_version() < 10:
        assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
