"""The parts of the Transformers patch: what Transformers installed where, how its sums are replaced, and plans."""
