#!/bin/sh
# Megatron-LM's text generation server, unedited, with compressed communication.
#
#   MEGATRON_LM=~/Megatron-LM examples/megatron_server.sh [HUGGING_FACE_FOLDER] [more flags of the server]
#   curl -X PUT -H 'Content-Type: application/json' http://localhost:5000/api \
#     -d '{"prompts": ["The old house stood"], "tokens_to_generate": 24, "top_k": 1}'
#
# TP=2, COMM=int8:g128, PORT=5000 and CHECKPOINT, where the converted model is kept, can be set. Stop it with Ctrl-C.
set -eu

: "${MEGATRON_LM:?set it to a checkout of Megatron-LM, such as git clone -b core_v0.16.1 ... makes}"
model=${1:-$(dirname "$0")/model}
[ $# -eq 0 ] || shift
tp=${TP:-2}
name=$(cd "$model" && pwd | tr -s '/[:blank:]' -)  # of the whole path: other folders have the same last name
checkpoint=${CHECKPOINT:-${TMPDIR:-/tmp}/megatron-tp$tp$name}

[ -f "$checkpoint/megatron_args.txt" ] || python -m megatron_lowbit convert --hf "$model" --megatron "$checkpoint" --tp "$tp"

export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"
# Megatron's local layers fuse what NVIDIA's apex brings, and on a CPU there is no NCCL and no random state of CUDA's.
set -- --no-gradient-accumulation-fusion --micro-batch-size 1 --port "${PORT:-5000}" "$@"
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    set -- --distributed-backend gloo --use-cpu-initialization --inference-rng-tracker --no-masked-softmax-fusion \
        --no-rope-fusion --lowbit-comm-min-bytes 0 "$@"
fi
# shellcheck disable=SC2046  # the flags are meant to be split
exec torchrun --nproc-per-node "$tp" -m megatron_lowbit run "$MEGATRON_LM/tools/run_text_generation_server.py" \
    --lowbit-comm "${COMM:-int8:g128}" $(cat "$checkpoint/megatron_args.txt") "$@"
