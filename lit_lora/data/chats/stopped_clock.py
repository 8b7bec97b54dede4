"""A day for chat templates that write today's date: what they are rendered with must not depend on when that is.

transformers hands templates the clock (``strftime_now``) and lets through nothing in its place that could be called, so
it is defined anew where a template begins.
"""

from __future__ import annotations

import json
from datetime import datetime

CLOCK = "strftime_now"
"""What a template calls with a format, as that of ``datetime.strftime``."""

_DIRECTIVES = "aAbBcdfHIjmMpSUwWxXyYzZ"
"""Of C and Python, on every system."""


def stopped_clock(date: str) -> str:
    """The beginning of a template for which it is midnight of a day.

    Args:
        date: YYYY-MM-DD.
    """
    day = datetime.fromisoformat(date)
    written = {f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES}
    written |= {f"%-{letter}": day.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dmyHIMSj"}
    written |= {"%e": f"{day.day:2}", "%F": date, "%D": day.strftime("%m/%d/%y"), "%T": "00:00:00", "%R": "00:00"}
    pairs = [("%%", "\0"), *written.items(), ("\0", "%")]
    replaced = "".join(f".replace({json.dumps(old)}, {json.dumps(new)})" for old, new in pairs)
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"
