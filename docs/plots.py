"""Draws docs/performance.svg and writes the tables of docs/performance.md and README.md, from docs/performance.json.

    python docs/plots.py --measure    # sqla-durable bench first, some five minutes; its options can follow
    python docs/plots.py              # from the figures that are there

Needs the extra `docs`; with `--measure` the extra `bench` too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES, PICTURE, PAGE = HERE / "performance.json", HERE / "performance.svg", HERE / "performance.md"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- written by docs/plots.py -->", "<!-- until here -->"

SUMMARY = {
    ("steps", "one plain step, async def"): "workflows of one step, one worker process, `async def`",
    ("steps", "one plain step, def"): "the same, `def` in threads",
    ("sequential", "20 workflows at a time"): "steps, 20 workflows at a time",
    ("transactional", "three steps with an insert each"): "workflows of three transactional steps, an ORM insert each",
    ("latency", "start to first step, p50"): "commit of a start to the first step, p50",
    ("latency", "start to the caller's result, p50"): "the same to the caller's result",
    ("latency", "signal to a waiting workflow, p50"): "commit of a signal to the suspended workflow that goes on, p50",
    ("bulk", "start_many"): "`start_many`",
}

_OURS, _SQL, _OTHER = "#3f51b5", "#e65100", "#757575"
_LEFT = 10

Figure = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        command = [sys.executable, "-m", "sqla_durable", "bench", "--json", str(FIGURES), *sys.argv[2:]]
        subprocess.run(command, check=True)
    outcome = json.loads(FIGURES.read_text())
    draw(outcome)
    write(PAGE, table(outcome))
    write(README, summary(outcome))


def write(page: Path, text: str) -> None:
    """Write a text between the two marks of a page."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def summary(outcome: dict[str, Any]) -> str:
    """Return the table of the README: what was measured, the figure, and the same work in SQL, in the same run."""
    lines = ["| what | figure | the same work in plain SQL, by pgbench, in the same run |", "| --- | ---: | --- |"]
    for figure in outcome["figures"]:
        words = SUMMARY.get((figure["workload"], figure["what"].split(" of ")[0]))
        if words is not None:
            in_sql = [
                f"{each['what']}: {_number(each['value'])}" for each in figure["references"] if "SQL" in each["what"]
            ]
            lines.append(f"| {words} | {_number(figure['value'])} {_unit(figure)} | {'; '.join(in_sql)} |")
    return "\n".join(lines)


def table(outcome: dict[str, Any]) -> str:
    """Return the machine and the figures as Markdown."""
    machine = outcome["machine"]
    settings = ", ".join(f"`{name}={machine['settings'][name]}`" for name in ("fsync", "synchronous_commit"))
    where = "on the same machine" if machine["is_local"] else "elsewhere"
    lines = [
        f"{machine['cores']} cores, {machine['system']}, Python {machine['python']}; "
        f"PostgreSQL {machine['server']} {where}, {settings}.",
        "",
        "| workload | measured | figure | compared with | ratio |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    for figure in outcome["figures"]:
        references = [f"{each['what']}: {_number(each['value'])}" for each in figure["references"]]
        ratios = [_number(each["ratio"]) for each in figure["references"]]
        cells = figure["workload"], figure["what"], f"{_number(figure['value'])} {_unit(figure)}"
        lines.append(f"| `{cells[0]}` | {cells[1]} | {cells[2]} | {'<br>'.join(references)} | {'<br>'.join(ratios)} |")
    return "\n".join([*lines, "", *_costs(outcome["figures"])])


def _costs(figures: list[Figure]) -> list[str]:
    names = "commits", "statements", "wal_bytes", "worker_ms", "server_ms", "worker_peak_mb"
    return [
        "| what one costs | commits | statements | WAL bytes | worker CPU ms | server CPU ms | worker MB at most |",
        f"| --- |{' ---: |' * len(names)}",
        *(
            f"| `{figure['workload']}`: {figure['what']}, each {figure['each']} | "
            + " | ".join(_number(figure["costs"][name]) for name in names)
            + " |"
            for figure in figures
            if figure["costs"] is not None
        ),
    ]


def _unit(figure: Figure) -> str:
    return {"workflows/s": "/s", "steps/s": "steps/s"}.get(figure["unit"], figure["unit"])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw(outcome: dict[str, Any]) -> None:
    """Draw the rates with what they are compared with, and the latencies."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sqla-durable", "font.size": 9})
    rates = [each for each in outcome["figures"] if each["unit"].endswith("/s")]
    times = [each for each in outcome["figures"] if each["unit"] == "ms"]
    heights = [len(rates) + 1.5, len(times) + 1.5] if times else [len(rates) + 1.5]
    picture, axes = plt.subplots(
        len(heights), 1, figsize=(8.5, 0.34 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    _draw_rates(axes[0][0], rates)
    if times:
        _draw_times(axes[1][0], times)
    picture.savefig(PICTURE, metadata={"Date": None})


def _draw_rates(axes: Any, figures: list[Figure]) -> None:
    rows = range(len(figures))
    axes.barh(rows, [each["value"] for each in figures], color=_OURS, height=0.6, label="sqla-durable")
    for row, figure in enumerate(figures):
        # At the foot of the bar, where no tick is.
        axes.annotate(_number(figure["value"]), (_LEFT * 1.1, row), va="center", color="white", fontsize=8)
        for each in figure["references"]:
            if each["value"] is not None:
                colour = _SQL if each["what"].startswith("SQL") else _OTHER
                axes.plot([each["value"]] * 2, [row - 0.42, row + 0.42], color=colour, linewidth=2.5)
    axes.plot([], [], color=_SQL, linewidth=2.5, label="the same work in SQL, by pgbench")
    axes.plot([], [], color=_OTHER, linewidth=2.5, label="naive ORM code, or another figure")
    axes.set_yticks(rows, [f"{each['workload']}: {each['what']}" for each in figures])
    axes.set_xscale("log")
    axes.set_xlim(left=_LEFT)
    axes.set_xlabel("workflows (in sequential: steps) per second")
    axes.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=3, frameon=False, fontsize=8)
    _tidy(axes)


def _draw_times(axes: Any, figures: list[Figure]) -> None:
    rows = range(len(figures))
    axes.barh(rows, [each["value"] for each in figures], color=_OURS, height=0.6)
    for row, figure in enumerate(figures):
        axes.annotate(f" {_number(figure['value'])}", (figure["value"], row), va="center", fontsize=8)
    axes.set_yticks(rows, [f"latency: {each['what']}" for each in figures])
    axes.set_xlabel("milliseconds")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
