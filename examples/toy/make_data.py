"""Writes the toy task: tokenizer, model shape, supervised rows, prompts.

python examples/toy/make_data.py --out runs/toy
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lens_megatron.data.toy import ToySizes, write_toy


def main() -> None:
    sizes = ToySizes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--supervised", type=int, default=sizes.supervised, help="rows for sft (default: %(default)s)")
    parser.add_argument("--train", type=int, default=sizes.train, help="prompts to train on (default: %(default)s)")
    parser.add_argument("--test", type=int, default=sizes.test, help="prompts held out (default: %(default)s)")
    given = parser.parse_args()
    write_toy(given.out, given.seed, ToySizes(given.supervised, given.train, given.test))
    print(f"toy task written to {given.out}")


if __name__ == "__main__":
    main()
