"""Model folders as others make them: `save_pretrained` of Transformers, of several families and kinds of tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_lowbit.cli.files import BUNDLED

DECODER = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.2}
T5 = {
    "vocab_size": 400,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BERT = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"} | {"pad_token_id": 0}
FOLDERS = {  # name: (model_type, sizes, kind of tokenizer)
    "qwen2 tied": ("qwen2", DECODER | {"tie_word_embeddings": True, "num_key_value_heads": 2}, "byte-level"),
    "llama": ("llama", DECODER, "pieces"),
    "gemma2": ("gemma2", DECODER | {"head_dim": 16}, "pieces"),
    "mixtral": ("mixtral", DECODER | {"num_local_experts": 4}, "pieces"),
    "gpt_neox": ("gpt_neox", DECODER, "byte-level"),
    "gpt2": ("gpt2", GPT2, "byte-level"),
    "t5": ("t5", T5, "pieces, then end"),
    "bert": ("bert", BERT | {"max_position_embeddings": 128}, "words"),
    "roberta": ("roberta", BERT | {"max_position_embeddings": 40, "type_vocab_size": 1}, "words"),
}
HEADS = {
    "t5": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM",
    "roberta": "AutoModelForMaskedLM",
}


def save(name: str, folder: Path) -> Path:
    """Save the model of this name, of random weights in several files with an index, and its tokenizer."""
    import transformers

    model_type, sizes, kind = FOLDERS[name]
    made = {
        "byte-level": _byte_level,
        "words": _words,
        "pieces": _pieces,
        "pieces, then end": lambda: _pieces(end=True),
    }
    tokenizer = made[kind]()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(3)
    head = getattr(transformers, HEADS.get(model_type, "AutoModelForCausalLM"))
    config = transformers.AutoConfig.for_model(model_type, **(ends | sizes))
    head.from_config(config).save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


def _byte_level():
    """As GPT-2's: pairs of bytes, no token in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _lines(), trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def _words():
    """As BERT's: pieces of words in lower case, a token before a text and one behind it, and one that masks."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(_lines(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _pieces(end: bool = False):
    """As sentencepiece's in tokenizer.json: words with a mark in front; of Llama a token before, of T5 one behind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    tokenizer.train_from_iterator(
        _lines(), trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
    )
    which = ("$A </s>", ("</s>", 1)) if end else ("<s> $A", ("<s>", 3))
    tokenizer.post_processor = processors.TemplateProcessing(single=which[0], special_tokens=[which[1]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _lines() -> list[str]:
    return (BUNDLED / "sample_text.txt").read_text().splitlines()
