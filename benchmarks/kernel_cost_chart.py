"""The chart of `benchmarks.kernel_cost`."""

from pathlib import Path
from typing import Any

from lmjax.console import load_pyplot


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Writes a picture of cycles a tile: a panel for each chip and pass, a pair of bars a case."""
    plot = load_pyplot()
    chips = list(dict.fromkeys(record["chip"] for record in records))
    passes = list(dict.fromkeys(record["pass"] for record in records))
    figure, panels = plot.subplots(
        len(passes), len(chips), figsize=(4 * len(chips), 3.2 * len(passes)), squeeze=False
    )
    for row, which in zip(panels, passes):
        for panel, chip in zip(row, chips):
            mine = [r for r in records if (r["chip"], r["pass"]) == (chip, which)]
            labels = list(dict.fromkeys(map(label, mine)))
            for side, shift, colour in (("splash", -0.2, "#b0b0b0"), ("ours", 0.2, "#1f77b4")):
                bars = {label(r): r["cycles_a_tile"] for r in mine if r["side"] == side}
                at = [labels.index(name) + shift for name in bars]
                panel.bar(at, bars.values(), 0.4, label=side, color=colour)
            panel.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
            panel.set_title(f"{chip}, {which}", fontsize=10)
            panel.set_ylabel("cycles a tile of allowed pairs", fontsize=8)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plot.close(figure)


def label(record: dict[str, Any]) -> str:
    """Name of a case."""
    group = record["heads"] // record["kv_heads"]
    name = record["mask"] if record["head_dim"] == 128 else f"causal d{record['head_dim']}"
    return f"{name} {group}:1" if group > 1 else name
