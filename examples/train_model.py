"""Train the small Llama that ships with the package, from any plain-text file, in one command.

    python examples/train_model.py --text TRAIN.txt --held-out HELDOUT.txt --out examples/model

The result is a Hugging Face folder: `config.json`, `model.safetensors` (bf16), `tokenizer.json` and a model card.
Byte-level BPE is trained on the same text. Its normalizer undoes hard line wrapping (a single newline becomes a
space, a blank line stays a paragraph break) and drops `_emphasis_` marks, so the model learns prose, not line lengths.
The matrices are trained with Muon, the rest with AdamW; a few million tokens repeated for several epochs need
dropout and weight decay more than they need parameters. Linear warm-up, then linear decay to zero.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# A small Llama for demonstrating low-bit tensor-parallel communication

{parameters:.1f} M parameters: {layers} layers, hidden size {hidden}, {heads} heads (as many KV heads), intermediate
size {intermediate}, BPE vocabulary of {vocab}, tied embeddings, context {context}. Its heads and features divide by
TP 2, 4 and 8. It writes recognisable English prose and knows nothing; it is here so that the effect of compressed
communication can be seen and measured without a download.

- **Data**: {data} ({characters:,} characters, {tokens:,} tokens, SHA-256 `{sha}`). The text itself is not distributed.
- **Licence**: weights and tokenizer Apache-2.0, like the rest of the repository.
- **Training**: {steps} steps of {batch} windows of {window} tokens ({epochs:.1f} epochs), {minutes:.0f} minutes on
  {threads} CPU threads.
- **Held-out perplexity**: {perplexity:.2f} per token ({bits:.3f} bits per character) on `{held_out}`
  (SHA-256 `{held_out_sha}`), windows of {window} tokens, no overlap.
- **Command**: `{command}`
"""


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over unwrapped prose."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("\r\n", "\n"),
            normalizers.Replace("_", ""),
            normalizers.Replace(Regex(r"\n[ \t]*\n\s*"), "\n\n"),
            normalizers.Replace(Regex(r"(?<!\n)\n(?!\n)"), " "),
            normalizers.Replace(Regex(r"[ \t]+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.sequence_length,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # residual branches start small, as in GPT-2
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= math.sqrt(2 * args.layers)
    return model


def add_dropout(model: LlamaForCausalLM, rate: float) -> list:
    """Dropout on the embedding and on both residual branches of each layer; Llama has none of its own. Removable."""

    def drop(module, inputs, output):
        return torch.nn.functional.dropout(output, rate, training=module.training)

    modules = [model.model.embed_tokens]
    modules += [m for layer in model.model.layers for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [m.register_forward_hook(drop) for m in modules]


def make_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in named if p.ndim == 2 and "embed" in n]
    vectors = [p for _, p in named if p.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.95),
        ),
    ]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, window: int) -> float:
    """Mean negative log likelihood per token, in nats, over consecutive windows."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        chunk = tokens[start : start + window][None]
        if chunk.shape[1] < 2:
            break
        logits = model(input_ids=chunk).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, chunk[0, 1:], reduction="sum").item()
        count += chunk.shape[1] - 1
    model.train()
    return total / count


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor | None, args: argparse.Namespace
) -> None:
    optimizers = make_optimizers(model, args)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    generator = torch.Generator().manual_seed(args.seed)
    window, per_epoch = args.sequence_length, max(1, (len(tokens) - 1) // args.sequence_length - 1)
    order: list[int] = []
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=args.quiet) as bar:
        task = bar.add_task("", total=args.steps, state="")
        for step in range(args.steps):
            scale = min(1.0, (step + 1) / args.warmup) * (args.steps - step) / args.steps
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * scale
            while len(order) < args.batch_size:  # each epoch cuts the text at another offset
                offset = int(torch.randint(window, (1,), generator=generator))
                order += [offset + i * window for i in torch.randperm(per_epoch, generator=generator).tolist()]
            starts, order = order[: args.batch_size], order[args.batch_size :]
            batch = torch.stack([tokens[s : s + window + 1] for s in starts])
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
                logits = model(input_ids=batch[:, :-1]).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.update(task, advance=1, state=f"loss {loss.item():.3f}")
            if (step + 1) % args.log_every == 0:
                note = f"step {step + 1}: loss {loss.item():.3f}"
                if held_out is not None:
                    note += f", held-out {held_out_loss(model, held_out[: 20 * window], window):.3f}"
                print(f"{note}, {time.perf_counter() - args.started:.0f} s", flush=True)
                model.save_pretrained(args.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="plain UTF-8 text to train on")
    parser.add_argument("--held-out", type=Path, help="text the reported perplexity is measured on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument(
        "--data-note", default="a plain-text file", help="what the training text is, for the model card"
    )
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast (for CPUs without bf16 instructions)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: needs a C++ compiler")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.started = time.perf_counter()
    torch.manual_seed(args.seed)

    text = args.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text, args.vocab_size)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    held_text = args.held_out.read_text(encoding="utf-8") if args.held_out else None
    held_out = torch.tensor(tokenizer(held_text)["input_ids"]) if held_text else None
    print(f"{len(text):,} characters, {len(tokens):,} tokens, {len(text) / len(tokens):.2f} characters per token")
    model = build_model(args)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)

    hooks = add_dropout(model, args.dropout)
    if args.compile:
        model.compile()
    train(model, tokens, held_out, args)
    for hook in hooks:
        hook.remove()
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    minutes = (time.perf_counter() - args.started) / 60
    if held_out is None:
        return
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)  # what a user will load
    loss = held_out_loss(model, held_out, args.sequence_length)
    facts = dict(
        parameters=model.num_parameters() / 1e6,
        layers=args.layers,
        hidden=args.hidden_size,
        heads=args.heads,
        intermediate=args.intermediate_size,
        vocab=args.vocab_size,
        context=args.sequence_length,
        data=args.data_note,
        characters=len(text),
        tokens=len(tokens),
        sha=hashlib.sha256(text.encode()).hexdigest(),
        steps=args.steps,
        batch=args.batch_size,
        window=args.sequence_length,
        minutes=minutes,
        threads=torch.get_num_threads(),
        epochs=args.steps * args.batch_size * args.sequence_length / len(tokens),
        perplexity=math.exp(loss),
        bits=loss * len(held_out) / len(held_text) / math.log(2),
        held_out=args.held_out.name,
        held_out_sha=hashlib.sha256(held_text.encode()).hexdigest(),
        command="python examples/train_model.py --text TRAIN.txt --held-out HELDOUT.txt --out examples/model "
        + " ".join(
            f"--{k.replace('_', '-')} {getattr(args, k)}"
            for k in ("steps", "batch_size", "lr", "weight_decay", "dropout", "seed")
        ),
    )
    (args.out / "README.md").write_text(CARD.format(**facts))
    print(json.dumps({"perplexity": facts["perplexity"], "bits_per_character": facts["bits"], "minutes": minutes}))


if __name__ == "__main__":
    main()
