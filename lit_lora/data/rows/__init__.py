"""Rows of files, folders, the Hub and memory."""
