"""`python -m benchmarks.experiments.ktda_transfer --teacher-weights FILE`: does KTDA's transfer help?

The same student with and without the transfer term (tiny models, generated scenes); see compare.py for what
is trained and measured. What differs between two runs of a seed is the term alone, first weights included.
`rsmodels pretrain` makes FILE, the teacher. Writes results/ktda_transfer.json and prints it as a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.experiments.compare import arguments, compare, recipe
from rsmodels.training.config import OptimConfig
from rsmodels.weights import sha256_of


def main(argv: list[str] | None = None) -> int:
    parser = arguments("ktda_transfer", __doc__, steps=500, lr=1e-3)
    parser.add_argument("--teacher-weights", required=True, help="the file that `rsmodels pretrain` wrote")
    options = parser.parse_args(argv)
    common = {"method": "ktda", "optim": OptimConfig(lr=options.lr, weight_decay=0.01)}
    # Padded from 128 to 140 pixels, the teacher's last patches would lie almost one off the student's.
    teacher = {"teacher_weights": options.teacher_weights, "teacher_fit": "resize"}
    variants = {
        "without the transfer term": recipe(options, model_args={"transfer": False}, **common),
        "KTDA": recipe(options, **teacher, **common),
    }
    setting = {"teacher_sha256": sha256_of(Path(options.teacher_weights)), "teacher_fit": "resize"}
    print(compare(variants, options, setting))
    return 0


if __name__ == "__main__":
    sys.exit(main())
