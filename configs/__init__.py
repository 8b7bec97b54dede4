"""The shipped configuration files and the data of the quickstart, as package data."""
