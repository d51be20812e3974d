"""Runs inside `.venv-areal`: the original's own reader on JSON tensors, one a line on stdin.

Prints a JSON list for each: dtype, shape, and the tensor's elements as bytes, every NaN as -1.
"""

from __future__ import annotations

import json
import sys
import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402
from areal.infra.rpc.serialization import SerializedTensor  # noqa: E402


def main() -> None:
    for line in sys.stdin:
        tensor = SerializedTensor(**json.loads(line)).to_tensor()
        width = tensor.element_size()
        bits = tensor.view(torch.uint8 if width == 1 else torch.int16).flatten().tolist()
        nan = tensor.to(torch.float32).isnan().flatten().tolist()
        shown = [-1 if is_nan else element for is_nan, element in zip(nan, bits, strict=True)]
        print(json.dumps([str(tensor.dtype), list(tensor.shape), shown]))


if __name__ == "__main__":
    main()
