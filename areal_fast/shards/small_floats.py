"""8-bit floats as the float32 of the same value: what JSON shows of them.

AReaL's own reader takes the data of any dtype that numpy does not have for float32 and casts
(SerializedTensor.to_tensor), so a float8 tensor that travelled as its own bytes would not even have the right
length there. Its own writer has no float8 at all. So JSON widens them, as it does bfloat16; whoever wants the
bytes as they are asks for raw ones or maps the file. Every value is exact, and comes back by a cast; of NaNs
their being one is kept.

Formats: OCP 8-bit Floating Point Specification 1.0 (e4m3fn, e5m2), the same with one NaN in the place of −0
and no infinity (…fnuz, arXiv:2206.02915), OCP Microscaling 1.0 (e8m0fnu: a power of two alone).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

_FORMATS: Final[dict[str, tuple[int, int, int]]] = {
    "float8_e4m3fn": (4, 3, 7),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2": (5, 2, 15),
    "float8_e5m2fnuz": (5, 2, 16),
}
"""Bits of exponent and mantissa, and the exponent's bias."""
SMALL_FLOATS: Final = frozenset({*_FORMATS, "float8_e8m0fnu"})


@cache
def table(dtype: str) -> npt.NDArray[np.float32]:
    """The value of each of the 256 bytes. dtype: one of SMALL_FLOATS."""
    if dtype == "float8_e8m0fnu":
        return np.array([2.0 ** (byte - 127) for byte in range(255)] + [np.nan], np.float32)
    return np.array([_value(byte, dtype) for byte in range(256)], np.float32)


def _value(byte: int, dtype: str) -> float:
    exponent_bits, mantissa_bits, bias = _FORMATS[dtype]
    exponent, mantissa = byte >> mantissa_bits & (1 << exponent_bits) - 1, byte & (1 << mantissa_bits) - 1
    sign = -1.0 if byte & 0x80 else 1.0
    if dtype.endswith("fnuz"):
        if byte == 0x80:
            return np.nan
    elif dtype == "float8_e4m3fn":
        if byte & 0x7F == 0x7F:
            return np.nan
    elif exponent == 31:
        return np.nan if mantissa else sign * np.inf
    fraction = mantissa / (1 << mantissa_bits)
    if exponent:
        return sign * (1 + fraction) * 2.0 ** (exponent - bias)
    return sign * fraction * 2.0 ** (1 - bias)


def widened(data: memoryview, dtype: str) -> memoryview:
    """float32 bytes of these elements."""
    return table(dtype)[np.frombuffer(data, np.uint8)].data.cast("B")
