"""The report of an inspection as one HTML page, which needs no network and nothing beside it.

Data is hostile until escaped: autoescape is on for all of the template, and the page's own policy forbids scripts,
requests and forms, should something slip through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

from lit_lora.data.look.pieces import visible

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What {{ model.base }} sees of {{ sources | map(attribute="name") | join(", ") }}</title>
<style>
:root { color-scheme: light dark; --line: #8886; --bar: #4a90d9; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
td, th { padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 28rem; border: 0; } td.bar div { background: var(--bar); height: .9rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 4px;
  padding: .7rem; font: 13px/1.45 ui-monospace, monospace; }
.off { opacity: .55; } .on { background: #3fa34d33; } .part { background: #e0a80044; }
.end { background: #3fa34d; color: #fff; border-radius: 3px; padding: 0 .15rem; }
.is_set td { font-weight: 600; } .bad { color: #c0392b; } .less { opacity: .7; }
</style>
</head>
<body>
<h1>What {{ model.base }} sees of {{ sources | map(attribute="name") | join(", ") }}</h1>
<p>Tokenizer: {{ tokenizer }}, {{ template }}.
{% if ends %}Answers end with
{% for token, count in ends.items() %}<code>{{ token }}</code> ({{ count | grouped }}){{ ", " if not loop.last }}
{%- endfor %}; they are supervised.{% endif %}
{% if num_open %}{{ num_open | grouped }} stretches that are supervised end without such a token.{% endif %}</p>
{% for warning in warnings %}<p class="bad">Warning: {{ warning }}</p>
{% endfor %}
<h2>Sources</h2>
<table>
<tr><th>source<th>format<th class="n">rows<th class="n">examples<th class="n">tokens<th class="n">supervised</tr>
{% for source in sources + validation %}
<tr><td>{{ source.name }}{{ ", for validation" if loop.index > sources | length }}
{{- ", " if source.share }}{{ source.share }}<td>{{ source.format }}
<td class="n">{{ source.num_rows | grouped }}{{ "" if source.is_whole else " of more" }}
<td class="n">{{ source.num_examples | grouped }}<td class="n">{{ source.num_tokens | grouped }}
{% if source.epoch_share is not none %} ({{ source.epoch_share | share(1) }} of an epoch's){% endif %}

<td class="n">{{ source.num_supervised | grouped }} ({{ source.num_supervised | share(source.num_tokens) }})</tr>
{% endfor %}
</table>
{% if num_set_aside %}<p>{{ num_set_aside | grouped }} of these examples are set aside for validation.</p>{% endif %}
{% for source in sources + validation %}
{% if source.pairs %}
<p>{{ source.name }}: {{ source.pairs.num_pairs | grouped }} preference pairs;
{{ source.pairs.num_prompt_tokens | grouped }} tokens of shared prompts,
{{ source.pairs.num_chosen_tokens | grouped }} chosen, {{ source.pairs.num_rejected_tokens | grouped }} rejected;
the chosen answer is the longer one in {{ source.pairs.num_chosen_longer | share(source.pairs.num_pairs) }}.</p>
{% endif %}
{% if source.notes %}<ul>
{% for note, count in source.notes.items() %}<li>{{ source.name }}: {{ count | grouped }} &times; {{ note }}</li>
{% endfor %}</ul>{% endif %}
{% endfor %}
{% if num_problems %}
<h2 class="bad">{{ num_problems | grouped }} {{ "row" if num_problems == 1 else "rows" }} cannot be used</h2>
<table>
<tr><th class="n">rows<th>problem<th>lines</tr>
{% for source in sources + validation %}{% for kind in source.problems %}
<tr><td class="n">{{ kind.count | grouped }}<td>{{ kind.message }}
<td>{% for file, lines in kind.lines.items() %}{{ file }}: {{ lines | join(", ") }}<br>{% endfor %}</tr>
{% endfor %}{% endfor %}
</table>
{% endif %}
{% if lengths %}
<h2>Tokens of an example</h2>
<p>{{ lengths.shortest | grouped }} to {{ lengths.longest | grouped }}, median {{ lengths.median | grouped }}, mean
{{ lengths.mean | round | int | grouped }}; 90 % have at most {{ lengths.most | grouped }}, 99 % at most
{{ lengths.nearly_all | grouped }}.</p>
{% set most = lengths.bins | map(attribute="count") | max %}
<table>
{% for bin in lengths.bins %}
<tr><td class="n">{{ bin.shortest | grouped }}&ndash;{{ bin.longest | grouped }}
<td class="bar"><div style="width: {{ (100 * bin.count / most) | round(1) }}%"></div>
<td class="n">{{ bin.count | grouped }}</tr>
{% endfor %}
</table>
<h2>What max_length would cut</h2>
<table>
<tr><th class="n">max_length<th class="n">examples cut<th class="n">tokens lost<th class="n">of them supervised
<th class="n">examples dropped</tr>
{% for cut in cuts %}
<tr{% if cut.is_set %} class="is_set"{% endif %}>
<td class="n">{{ cut.max_length | grouped }}{{ " (as it is set)" if cut.is_set else "" }}
<td class="n">{{ cut.num_cut | grouped }}<td class="n">{{ cut.num_tokens_lost | grouped }}
<td class="n">{{ cut.num_supervised_lost | grouped }}<td class="n">{{ cut.num_dropped | grouped }}</tr>
{% endfor %}
</table>
{% endif %}
{% if examples %}
<h2>As the model sees it</h2>
<p><span class="off">〔not supervised〕</span> <span class="on">supervised</span> <span class="end">where an answer
ends ■</span></p>
{% for example in examples %}
<p class="less">{{ example.source }}:{{ example.line }},
{% if example.part %}part {{ example.part + 1 }}, {% endif %}{{ example.num_tokens | grouped }} tokens,
{{ example.num_supervised | grouped }} supervised</p>
{% for name, pieces in example.parts.items() %}
{% if name %}<p>{{ name }}</p>{% endif %}
<pre>{% for piece in pieces -%}
{% if not piece.weight %}<span class="off">〔{{ piece.text | visible }}〕</span>
{%- elif piece.is_end %}<span class="end">{{ piece.text | visible }}■</span>
{%- elif piece.weight != 1 %}<span class="part">〔&times;{{ piece.weight }} {{ piece.text | visible }}〕</span>
{%- else %}<span class="on">{{ piece.text | visible }}</span>
{%- endif -%}
{%- if piece.num_left_out %} ... {{ piece.num_left_out | grouped }} tokens ... {% endif -%}
{%- endfor %}</pre>
{% endfor %}{% endfor %}
{% endif %}
{% if suggested %}
<h2>Suggested settings</h2>
<p>For a file given with <code>--config</code>:</p>
<pre>{{ yaml }}</pre>
{% endif %}
</body>
</html>
"""


def page_of(report: Mapping[str, Any]) -> str:
    """The page.

    Args:
        report: as :meth:`lit_lora.data.look.report.DataReport.to_dict` has it.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["grouped"] = lambda number: f"{number:,}"
    environment.filters["share"] = lambda part, whole: f"{part / whole:.0%}" if whole else "0%"
    environment.filters["visible"] = visible
    return environment.from_string(_TEMPLATE).render(report)
