"""The report of a run: one HTML file with everything in it, for people.

It is made from the files of the run folder alone and refers to nothing outside itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 720, 260
LEFT, BOTTOM, TOP, RIGHT = 52, 28, 12, 12  # margins of the plot, for its axes

STYLE = """
:root { --ink: #1d2328; --dim: #66707a; --line: #dde2e7; --paper: #ffffff; --panel: #f6f8fa;
  --train: #2f6fde; --held: #d9822b; --good: #1a7f4b; --bad: #c8323c; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --dim: #97a1ab; --line: #333b44; --paper: #14181c;
  --panel: #1c2228; --train: #6ea2ff; --held: #f0a860; --good: #4cc38a; --bad: #ff7b83; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 800px; padding: 32px 20px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 10px; } p { margin: 4px 0; }
.dim { color: var(--dim); } .good { color: var(--good); } .bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; } td { padding: 6px 10px 6px 0; border-top: 1px solid var(--line);
  vertical-align: top; } td:first-child { white-space: nowrap; }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 11px; } .grid { stroke: var(--line); }
.train { stroke: var(--train); } .held { stroke: var(--held); } polyline { fill: none; stroke-width: 2; }
circle { fill: var(--paper); stroke-width: 2; }
article { background: var(--panel); border-radius: 8px; padding: 12px 16px; margin: 0 0 14px; }
dt { color: var(--dim); font-size: 13px; margin-top: 8px; } dd { margin: 0; }
pre, dd { white-space: pre-wrap; overflow-wrap: anywhere; } pre { background: var(--panel); border-radius: 8px;
  padding: 12px 16px; font-size: 13px; margin: 0; }
"""

# What is drawn beside the loss, where the log has it.
WATCHED = {
    "rewards/margins": "Reward margins",
    "rewards/accuracies": "Reward accuracy",
    "logps/chosen": "Log-probability of the chosen answers",
    "general/loss": "Loss on general text that is replayed",
    "general/kl": "KL from the base on general text, nats a token",
    "watch/kl": "KL from the start, nats a token",
    "watch/entropy": "Entropy, nats a token",
    "samples/tokens": "Tokens of sampled answers",
}


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder from its recipe, log, environment and proof; answer its path."""
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    environment, proof = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("environment.json", "proof.json")
    )
    path = folder / "report.html"
    path.write_text(render(folder.resolve().name, recipe, log, environment, proof), encoding="utf-8")
    return path


def render(
    title: str,
    recipe: str,
    log: Sequence[dict[str, float]],
    environment: dict[str, Any],
    proof: dict[str, Any],
) -> str:
    """The whole page. Every text from outside is escaped."""
    verdict = '<b class="good">passed</b>' if proof["passed"] else '<b class="bad">failed</b>'
    last = next((line for line in reversed(log) if "loss" in line), None)
    told = f" · {last['step']:,} steps · {last['tokens_per_second']:,.0f} tokens/s" if last else ""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">proof {verdict}{told}</p>',
        "<h2>Proof</h2>",
        _table((_mark(check["passed"]), escape(check["text"])) for check in proof["checks"]),
        "<h2>Loss</h2>",
        curve(log, "loss"),
        *(
            part
            for name, title in WATCHED.items()
            if any(name in line or f"eval_{name}" in line for line in log)
            for part in (f"<h2>{title}</h2>", curve(log, name))
        ),
        "<h2>Before and after</h2>",
        '<p class="dim">Greedy answers to the same prompts.</p>',
        *map(_sample, proof["samples"]),
        "<h2>Recipe</h2>",
        f"<pre>{escape(recipe)}</pre>",
        "<h2>Environment</h2>",
        _table((escape(name), escape(str(value))) for name, value in environment.items()),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>{body}</body></html>\n'


def curve(log: Sequence[dict[str, float]], name: str) -> str:
    """What the log says under a name, in training and of the held-out rows, over the steps, as SVG."""
    keys = {"train": name, "held": f"eval_{name}"}
    curves = {kind: [(line["step"], line[key]) for line in log if key in line] for kind, key in keys.items()}
    points = [point for along in curves.values() for point in along]
    if not points:
        return '<p class="dim">No step was logged.</p>'
    most = max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    room = 0.05 * (high - low) or 0.5
    low, high = low - room if low < 0 else max(0.0, low - room), high + room

    def x(step: float) -> float:
        return LEFT + step / most * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    marks = []
    for part in range(5):
        loss, step = low + part / 4 * (high - low), most * part / 4
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(loss):.1f}" y2="{y(loss):.1f}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
        marks.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step:.0f}</text>')
    for kind, along in curves.items():
        line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in along)
        marks.append(f'<polyline class="{kind}" points="{line}"/>')
        dots = along if kind == "held" or len(along) == 1 else []
        marks += [f'<circle class="{kind}" cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3"/>' for step, loss in dots]
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} over steps">{"".join(marks)}</svg>'
    )
    legend = '<span style="color:var(--train)">training</span>'
    if curves["held"]:
        legend += ' · <span style="color:var(--held)">held out</span>'
    return f'{svg}<p class="dim">{legend} · over steps</p>'


def _sample(sample: dict[str, str]) -> str:
    names = {"prompt": "prompt", "reference": "the data say", "before": "before", "after": "after"}
    items = "".join(f"<dt>{told}</dt><dd>{escape(sample[name]) or '&nbsp;'}</dd>" for name, told in names.items())
    return f"<article><dl>{items}</dl></article>"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return f"<table>{''.join(f'<tr><td>{name}</td><td>{value}</td></tr>' for name, value in rows)}</table>"


def _mark(passed: bool) -> str:
    return '<span class="good">✓ ok</span>' if passed else '<span class="bad">✗ failed</span>'
