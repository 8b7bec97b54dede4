"""``lit-lora report``: a page to look at, of one run or of several side by side."""

from __future__ import annotations

from pathlib import Path


def report(runs: list[str], output: str | None = None) -> Path:
    """Write one HTML page that holds all it shows: verdict, curves, gradients and updates by layer, memory, settings.

    Args:
        runs: folders of runs; of one that is still going on, the page shows how far it has come. Several are compared.
        output: file to write; by default report.html in the folder of the run. To be named for several runs.

    Returns:
        The file.
    """
    from lit_lora.report.page import write_report

    path = write_report(runs, output)
    print(f"report written to {path}")
    return path
