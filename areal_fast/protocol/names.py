"""Names of dump files: upstream's form, made safe and at most 255 bytes.

`{session}-trajectory-{n}.json` and `{session}-active.json`. In the session id `/`, NUL, control characters
and a leading dot are percent-encoded, so that no id names a place outside the directory or hides its file. A
name that would be too long keeps its beginning and end, with a hash of the whole between. An existing file is
never overwritten: `.1`, `.2`… are appended. Temporary names begin with a dot, which no dump's name does.
"""

from __future__ import annotations

import hashlib

MAX_NAME_BYTES = 255
_HASH_CHARS = 16


def _safe(session_id: str) -> str:
    out: list[str] = []
    for c in session_id:
        code = ord(c)
        if (
            c == "/"
            or code < 0x20
            or 0x7F <= code < 0xA0
            or 0xD800 <= code < 0xE000
            or code in (0x2028, 0x2029)
        ):
            out.append("".join(f"%{b:02X}" for b in c.encode("utf-8", "surrogatepass")))
        else:
            out.append(c)
    if out and out[0] == ".":
        out[0] = "%2E"
    return "".join(out)


def dump_name(session_id: str, trajectory: int, n: int = 0) -> str:
    """The file name of one part of a session; trajectory −1 is what is active. n > 0: its n-th alternative,
    for when the plain name and those before n are taken."""
    tail = "-active.json" if trajectory < 0 else f"-trajectory-{trajectory}.json"
    if n:
        tail += f".{n}"
    name = _safe(session_id) + tail
    raw = name.encode("utf-8")
    if len(raw) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARS]
    end = f"~{digest}{tail}"
    head = raw[: MAX_NAME_BYTES - len(end.encode())]
    return head.decode("utf-8", "ignore") + end


def temporary(token: str, part: int) -> str:
    """Where part number `part` is written before it gets its name. `token` is hex, this session's own."""
    return f".{token}-{part}.tmp"
