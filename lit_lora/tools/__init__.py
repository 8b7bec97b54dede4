"""Command-line verbs that are no Trainer methods: one function each."""
