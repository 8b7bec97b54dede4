"""What happens between the batches and the checkpoints of a run."""
