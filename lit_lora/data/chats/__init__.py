"""From rows to tokens and what of them is learned."""
