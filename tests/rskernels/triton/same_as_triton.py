"""Are the builds of rskernels.triton.aot those that Triton's own first call on such a chip would compile?

Run by test_aot in a process that does not interpret kernels, with a cache of its own. Prints how many were
compared, and how many `warm` put into the cache.
"""

import importlib
import os
from pathlib import Path

from triton.compiler import ASTSource, make_backend
from triton.runtime import driver

from rskernels.triton import aot, launch

CHIP = 90


def of_triton(noted):
    """What Triton would compile: the source and the options."""
    found = []

    def instead(key, signature, device, constants, options, attributes, warmup):
        found.append((ASTSource(noted.kernel, signature, constants, attributes), options))

    noted.kernel._do_compile = instead
    noted.kernel.warmup(*noted.arguments, grid=noted.grid, **noted.constants)
    del noted.kernel._do_compile
    return found[0]


driver.set_active(aot.NoDriver(CHIP))
compared = 0
for operator in aot.OPERATORS:
    examples = list(importlib.import_module(f"rskernels.triton.{operator}").examples())
    for name, call in (examples[0], examples[len(examples) // 2], examples[-1]):
        with launch.noting(CHIP) as launches:
            call()
        for noted in launches:
            signature, constants, attributes, options = aot._specialise(noted)
            ours = ASTSource(noted.kernel, signature, constants, attributes)
            theirs, their_options = of_triton(noted)
            where = operator, name, noted.kernel.fn.__name__
            assert ours.signature == theirs.signature, (*where, ours.signature, theirs.signature)
            assert ours.constants == theirs.constants, (*where, ours.constants, theirs.constants)
            told = {path: facts for path, facts in theirs.attrs.items() if facts}
            assert ours.attrs == told, (*where, ours.attrs, told)
            backend = make_backend(driver.active.get_current_target())
            assert backend.parse_options(options).hash() == their_options.hash(), where
            compared += 1
aot.warm([launches[-1]], CHIP, jobs=1)
built = list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))
print(f"{compared} compared, {len(built)} built")
