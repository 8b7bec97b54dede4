"""A batch's way through a language model, found by trial."""
