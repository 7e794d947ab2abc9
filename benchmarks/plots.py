"""Draws what is in a folder of results: python -m benchmarks.plots [FOLDER, default benchmarks/results].

Each picture has the name of what it shows and is drawn from the JSON files of the benchmarks alone.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
COLOURS = {"off": "#8c8c8c", "on": "#76b900", "ideal": "#1f4e79"}
LABELS = {"off": "without the cache", "on": "with the cache", "ideal": "ideal: repeats cost nothing"}
WAYS = {
    "ours": ("this project, checksum included", "#76b900"),
    "ours_nixl": ("the same by NIXL", "#b5d86a"),
    "nixl_write": ("Dynamo NixlWrite", "#1f4e79"),
    "nixl_read": ("Dynamo NixlRead", "#c55a11"),
    "local": ("Dynamo Local (file)", "#8064a2"),
}


def ttft_distribution(folder: Path) -> Figure:
    """Draw which share of the requests has its first token by when: hits, misses, and without the cache."""
    report = _read(folder / "serving/reuse-80.json")
    kinds = report["ttft_ms_by_kind"]
    figure, axes = _canvas("Time to first token at 80 % reuse: hits skip the encode worker")
    everything = kinds["off"]["hit"] + kinds["off"]["miss"]
    for label, values, colour, style in (
        ("hit", kinds["on"]["hit"], COLOURS["on"], "-"),
        ("miss", kinds["on"]["miss"], "#c55a11", "-"),
        ("without the cache", everything, COLOURS["off"], "--"),
    ):
        ordered = sorted(values)
        shares = [100 * (rank + 1) / len(ordered) for rank in range(len(ordered))]
        median = ordered[len(ordered) // 2]
        axes.plot(
            ordered, shares, style, color=colour, label=f"{label} (median {median:.0f} ms)", linewidth=2
        )
    axes.set_xlabel("time to first token, ms")
    axes.set_ylabel("requests that have it by then, %")
    axes.set_xlim(left=0)
    axes.legend(loc="lower right", frameon=False)
    _note(axes, _setting(report))
    return figure


def throughput_by_reuse(folder: Path) -> Figure:
    """Draw requests per second against reuse, for the three arms."""
    paths = sorted((folder / "serving").glob("reuse-*.json"), key=lambda path: int(path.stem[6:]))
    reports = [_read(path) for path in paths]
    if not reports:
        raise FileNotFoundError(errno.ENOENT, "no results of serving", str(folder / "serving/reuse-*.json"))
    figure, axes = _canvas("Throughput against reuse")
    for arm, label in LABELS.items():
        points = [
            (100 * report["reuse"], report["arms"].get(arm, report["arms"]["off"])["requests_per_s"])
            for report in reports
        ]
        style = "--" if arm == "ideal" else "-"
        axes.plot(*zip(*points, strict=True), f"o{style}", color=COLOURS[arm], label=label, linewidth=2)
    axes.set_xlabel("pictures that came before, % of all")
    axes.set_ylabel("requests per second")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", frameon=False)
    _note(axes, _setting(reports[-1]))
    return figure


def hit_ratio_by_capacity(folder: Path) -> Figure:
    """Draw the hit ratio against the capacity: both policies, with and without scans."""
    report = _read(folder / "hit_ratio.json")
    figure, axes = _canvas("Hit ratio against capacity: S3-FIFO keeps what is popular while scans pass")
    shares = [100 * share for share in report["capacity_shares"]]
    for name, style, words in (("zipf", "-", "popular pictures only"), ("scans", "--", "with scans between")):
        for policy, label, colour in (("lru", "LRU", "#8c8c8c"), ("s3fifo", "S3-FIFO", "#76b900")):
            ratios = [100 * ratio for ratio in report["traffic"][name]["hit_ratio"][policy]]
            axes.plot(shares, ratios, f"o{style}", color=colour, label=f"{label}, {words}", linewidth=2)
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("capacity, % of the bytes of all pictures asked for")
    axes.set_ylabel("requests answered from the cache, %")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", frameon=False)
    return figure


def transfer_time_by_size(folder: Path) -> Figure:
    """Draw how long an embedding takes after the reply, with the lines of a memcpy and of the goal."""
    report = _read(folder / "transfer.json")
    sizes = report["sizes"]
    megabytes = [float(name.split()[0]) for name in sizes]
    figure, axes = _canvas("From the encode worker's reply to an embedding in the cache, one host")
    for way in next(iter(sizes.values()))["ways"]:
        if way not in WAYS:
            continue  # what shows a part of a way has its place in the table
        label, colour = WAYS[way]
        times = [row["ways"][way]["committed_ms"] for row in sizes.values()]
        axes.plot(megabytes, times, "o-", color=colour, label=label, linewidth=2)
    for key, label, style in (
        ("memcpy_ms", "memcpy of the same bytes", "k--"),
        ("goal_ms", "goal: 1.5 memcpy + 0.4 ms", "k:"),
    ):
        axes.plot(megabytes, [row[key] for row in sizes.values()], style, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(megabytes, [f"{size:g}" for size in megabytes])
    axes.minorticks_off()
    axes.set_yticks([0.1, 1, 10, 100, 1000], ["0.1", "1", "10", "100", ""])  # room for the legend
    axes.set_xlabel("size of the embedding, MB")
    axes.set_ylabel("ms (median)")
    axes.legend(loc="upper left", frameon=False, ncols=2)
    return figure


PLOTS: dict[str, Callable[[Path], Figure]] = {
    plot.__name__: plot
    for plot in (ttft_distribution, throughput_by_reuse, hit_ratio_by_capacity, transfer_time_by_size)
}


def draw(folder: Path) -> list[Path]:
    """Draw every picture whose results are in the folder; return the files."""
    mpl.use("agg")
    files = []
    for name, plot in PLOTS.items():
        try:
            figure = plot(folder)
        except FileNotFoundError as error:
            print(f"{name}: not drawn, {error.filename} is not there", file=sys.stderr)
            continue
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        files.append(path)
    return files


def _canvas(title: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#e0e0e0")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _note(axes: Axes, text: str) -> None:
    axes.text(0, -0.19, text, transform=axes.transAxes, fontsize=8, color="#606060")


def _setting(report: dict[str, Any]) -> str:
    run = report["this_run"]
    return (
        f"{run['requests']} requests x {run['rounds']} rounds, {run['concurrency']} at a time, pictures of "
        f"{run['width']} x {run['height']}; tiny model on {report['machine']['cores']} CPU cores, AIPerf "
        f"{report['aiperf']}"
    )


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    for file in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS):
        print(file)
