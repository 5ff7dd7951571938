"""What the patches of DeepSpeed and of Transformers share: they run the same models, of Transformers."""
