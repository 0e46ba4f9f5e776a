"""`python -m rsmodels.data.synthetic scene.tif`: write a georeferenced synthetic scene and its label."""

from __future__ import annotations

import argparse

from rsmodels.data.synthetic.geotiff import write_scene


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rsmodels.data.synthetic", description=__doc__)
    parser.add_argument("path", help="GeoTIFF to write; its label goes to NAME_label.tif beside it")
    parser.add_argument("--size", type=int, default=2048, help="side in pixels (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another place (default: 0)")
    parser.add_argument("--domain", help="for example region=coast,bands=irrg,climate=arid")
    options = parser.parse_args()
    try:
        label = write_scene(options.path, options.size, seed=options.seed, domain=options.domain)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"scene: {options.path}, {options.size} x {options.size} pixels\nlabel: {label}")


if __name__ == "__main__":
    main()
