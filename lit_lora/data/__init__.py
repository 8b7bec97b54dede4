"""Instruction data: formats, tokenization, packing, and batches whose order survives a stop."""
