"""Write a complete tiny vision-language model with random weights: python tools/make_tiny_model.py --help."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiny_models import ARCHITECTURES, make_tiny_model


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(description="Write a complete tiny model directory with random weights.")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="qwen2_vl")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    arguments = parser.parse_args()
    make_tiny_model(arguments.architecture, arguments.out, seed=arguments.seed)
    print(f"wrote a tiny {arguments.architecture} model to {arguments.out}")


if __name__ == "__main__":
    main()
