"""Tokenized once, by several processes, into files that are read where they are needed."""
