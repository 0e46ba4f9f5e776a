"""What torchrun starts: `torchrun --nproc-per-node=4 train.py …` is `rsmodels train …` on four ranks."""

import sys

from rsmodels.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
