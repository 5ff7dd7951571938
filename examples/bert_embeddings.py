"""What compression does to sentence embeddings: an encoder under tensor parallelism, exact and compressed.

    torchrun --nproc-per-node 2 examples/bert_embeddings.py --model ~/models/bert-base-uncased
    torchrun --nproc-per-node 2 examples/bert_embeddings.py --spec int8:g128 --spec int4:g32 --spec gauss4:g128

The embedding of a sentence is the mean of its tokens' last hidden states. Each row of the table compares those of the
sharded model with those of the whole one. Without --model a small BERT with random weights is made, which shows that it
works, and nothing about accuracy.
"""

import argparse
import os
import string
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

import megatron_lowbit as lowbit

SENTENCES = Path(__file__).parent / "prompts.txt"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder with an encoder; default: a random BERT")
    parser.add_argument("--engine", choices=("deepspeed",), default="deepspeed", help="what shards the model")
    parser.add_argument("--spec", action="append", help="may be repeated; default: int8:g128 and int4:g32")
    parser.add_argument("--text", action="append", help="may be repeated; default: the lines of examples/prompts.txt")
    parser.add_argument("--min-bytes", type=int, default=0, help="smaller messages go uncompressed; default: none do")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun, such as torchrun --nproc-per-node 2 examples/bert_embeddings.py")
    args.text = args.text or [line for line in SENTENCES.read_text().splitlines() if line.strip()]
    args.spec = args.spec or ["int8:g128", "int4:g32"]
    return args


def random_bert(folder: Path) -> None:
    """A BERT of 4 layers that reads characters, the same on every rank."""
    pieces = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *string.digits, *string.punctuation]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)


def load(folder: Path) -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    """The encoder of a folder, in fp32 and without a head, and its tokenizer."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForTextEncoding if config.is_encoder_decoder else transformers.AutoModel
    model = kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(model: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[sentences, features]"""
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


def row(name: str, found: torch.Tensor, exact: torch.Tensor) -> str:
    cosine = torch.nn.functional.cosine_similarity(found.double(), exact.double(), dim=-1)
    error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    sent = [sum(site[kind] for site in lowbit.stats().values()) for kind in ("bytes_sent", "bytes_bf16")]
    saved = f"{sent[0] / sent[1]:.3f}" if sent[1] else "-"
    return f"{name:20} {cosine.min():11.7f} {cosine.mean():11.7f} {error.max():11.2e} {error.mean():11.2e} {saved:>10}"


def main() -> None:
    args = parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        if args.model is None:
            random_bert(Path(temporary))  # before the ranks know each other, or only the first would save it
        model, tokenizer = load(args.model or Path(temporary))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    device = "cuda" if cuda else "cpu"
    batch = tokenizer(args.text, padding=True, truncation=True, max_length=128, return_tensors="pt").to(device)
    exact = embed(model.to(device), batch)
    engine = lowbit.patches.deepspeed.init_inference(model, dist.get_world_size(), config=None)  # sharded, and exact
    header = f"{'':20} {'cosine, min':>11} {'mean':>11} {'error, max':>11} {'mean':>11} {'bytes/bf16':>10}"
    rows = [header, row("exact", embed(engine, batch), exact)]
    for spec in args.spec:
        lowbit.telemetry.reset_stats()
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig(spec, min_bytes=args.min_bytes)) as handle:
            rows.append(row(spec, embed(engine, batch), exact))
    if dist.get_rank() == 0:
        if args.model is None:
            print("A BERT with random weights: give --model for one that was trained.")
        ranks = dist.get_world_size()
        print(f"{len(args.text)} sentences, {args.engine} on {ranks} ranks, {len(handle.sites)} sites a forward pass\n")
        print("\n".join(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
