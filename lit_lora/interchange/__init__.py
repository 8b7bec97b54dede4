"""Adapters as other libraries read and write them."""
