"""``docs/settings.md`` is what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_lora.cli.settings_page import page

PAGE = Path(__file__).resolve().parents[2] / "docs/settings.md"


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_page_is_that_of_the_code():
    assert page() == PAGE.read_text(), "run: python -m lit_lora.cli.settings_page > docs/settings.md"
