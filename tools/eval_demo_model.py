"""Print how truly a demo model answers, kind by kind, and how often with the embeddings of other pictures."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

from demo_model.scoring import held_out, score, table

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Parse the command line, score, print the table and the wrong answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models/shapes-qwen2-vl", metavar="DIR")
    parser.add_argument("--count", type=int, default=500, help="of questions (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of pictures and questions (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--wrong", type=int, default=10, help="wrong answers to print (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    cases = held_out(arguments.count, arguments.seed)
    results = list(tqdm(score(arguments.model, cases, arguments.seed), total=len(cases), unit="question"))
    print("| questions | asked | right | the same with other pictures' embeddings |\n|---|---:|---:|---:|")
    for line in table(results):
        if line.asked:
            right, kept = line.right / line.asked, line.kept / line.asked
            print(f"| {line.name} | {line.asked} | {right:.1%} | {kept:.1%} |")
    for result in [result for result in results if not result.right][: arguments.wrong]:
        question = result.case.question
        print(f"wrong: {question.text} -> {result.answer!r}, truth {question.answer!r}")
    print(f"seed {arguments.seed}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
