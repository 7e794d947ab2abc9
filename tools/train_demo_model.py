"""Train the demo model from a seed on a CPU, with progress; stop and start at will. --help says how."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from demo_model.model import save_model
from demo_model.tokenizer import make_tokenizer
from demo_model.training import Plan, Training

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Parse the command line, train what is left to train, and write the model directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "models/shapes-qwen2-vl", metavar="DIR")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".run/demo-model", metavar="DIR", help="of the checkpoint"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="default: %(default)s")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="default: %(default)s; on a busy machine 1 is faster: threads wait for each other",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()
    training = Training(Plan(arguments.seed, arguments.steps), tokenizer, arguments.work)
    training.run()
    save_model(training.model, tokenizer, arguments.out)
    print(f"wrote the demo model to {arguments.out}; tools/eval_demo_model.py scores it")


if __name__ == "__main__":
    main()
