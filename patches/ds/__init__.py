"""The parts of the DeepSpeed patch: what is compressed where, one kind of DeepSpeed's layers a file."""
