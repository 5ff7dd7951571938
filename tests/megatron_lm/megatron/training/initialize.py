"""Megatron's start: arguments, process group, parallel state, seeds."""

import torch
from megatron.core import mpu, tensor_parallel
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import get_args, set_args


def initialize_megatron(extra_args_provider=None, ignore_unknown_args=False, allow_no_cuda=False):
    if not allow_no_cuda:
        assert torch.cuda.is_available(), "Megatron requires CUDA."
    args = parse_args(extra_args_provider, ignore_unknown_args)
    validate_args(args)
    set_args(args)
    _initialize_distributed()
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    _compile_dependencies()


def _initialize_distributed():
    args = get_args()
    if not torch.distributed.is_initialized():
        torch.cuda.set_device(args.rank)
        torch.distributed.init_process_group(args.distributed_backend, world_size=args.world_size, rank=args.rank)
    if torch.cuda.device_count() > 0:
        mpu.initialize_model_parallel(args.tensor_model_parallel_size, create_gloo_process_groups=False)


def _compile_dependencies():
    raise RuntimeError("there is no compiler here")
