"""`python -m benchmarks.experiments.crossearth_ladder --pretrained FILE`: what each part of CrossEarth adds.

From the frozen backbone under Mask2Former to the whole method, one part after another (tiny models, generated
scenes); see compare.py for what is trained and measured. `rsmodels pretrain` makes FILE, the backbone. Writes
results/crossearth_ladder.json and prints it as a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.experiments.compare import arguments, compare, recipe
from rsmodels.weights import sha256_of

PARTS = ("rein", "gse", "mim", "style")
LADDER = {"source only": 0, "Rein": 1, "+ GSE, injector": 2, "+ MIM": 3, "+ style (CrossEarth)": 4}


def main(argv: list[str] | None = None) -> int:
    parser = arguments("crossearth_ladder", __doc__, steps=500, lr=1e-3)
    parser.add_argument("--pretrained", required=True, help="the file that `rsmodels pretrain` wrote")
    options = parser.parse_args(argv)
    variants = {
        name: recipe(
            options,
            method="crossearth",
            pretrained=options.pretrained,
            model_args={part: number < parts for number, part in enumerate(PARTS)},
        )
        for name, parts in LADDER.items()
    }
    print(compare(variants, options, {"pretrained_sha256": sha256_of(Path(options.pretrained))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
