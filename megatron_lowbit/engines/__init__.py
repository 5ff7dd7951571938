"""Inference engines: a Hugging Face model folder in, tensor-parallel text generation and perplexity out."""
