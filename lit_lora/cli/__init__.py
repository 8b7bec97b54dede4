"""The command line: parsing, checking, and the record of a run."""
