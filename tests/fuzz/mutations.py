"""Random damage to the content of a file: `mutate(content, random.Random(seed))` returns other bytes."""

import json
import random
import re
import struct
from typing import Any

# Sizes that a damaged file may declare, and values that a JSON file may have in place of the right ones.
SIZE_CLAIMS = [-1, 0, 1, -(2**31), 2**31 - 1, 2**32 - 1, 10**15, 2**63 - 1, -(2**63)]
WRONG_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**15,
    2**64,
    -(10**400),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    [],
    {},
    [[]],
    {"a": 1},
    2.5,
]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damage the content, or change sizes in it. In JSON also change the types of values."""
    mutations = [
        _truncate,
        _append_bytes,
        _flip_bits,
        _flip_bits,
        _swap_ends,
        _replace_binary_number,
        _replace_binary_number,
        _replace_number,
        _replace_number,
        _delete_or_repeat_range,
    ]
    if content[:1] in (b"{", b"["):
        mutations += [_replace_value] * 8
    return rng.choice(mutations)(content, rng)


def _truncate(content: bytes, rng: random.Random) -> bytes:
    """Cut the end off, at a random position or by one byte."""
    return content[: rng.choice([0, 1, len(content) - 1, rng.randrange(len(content) + 1)])]


def _append_bytes(content: bytes, rng: random.Random) -> bytes:
    """Append zeros, random bytes, a copy of the content, or brackets that nest deeply."""
    return content + rng.choice([b"\0", bytes(8), rng.randbytes(100), content, b"[" * 100_000, b"{" * 100_000])


def _flip_bits(content: bytes, rng: random.Random) -> bytes:
    """Flip one to ten bits."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 10]) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _swap_ends(content: bytes, rng: random.Random) -> bytes:
    """Exchange the beginning and the end of the content; a random range stays between them."""
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[end:] + content[start:end] + content[:start]


def _delete_or_repeat_range(content: bytes, rng: random.Random) -> bytes:
    """Delete or repeat a range of bytes."""
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return rng.choice([content[:start] + content[end:], content[:end] + content[start:]])


def _replace_binary_number(content: bytes, rng: random.Random) -> bytes:
    """Overwrite a binary number, mostly one in the header."""
    size = rng.choice(SIZE_CLAIMS)
    num_bytes = rng.choice([4, 8])
    packed = struct.pack("<q", size)[:num_bytes]
    if num_bytes == 4 and size < 0:
        packed = struct.pack("<i", max(size, -(2**31)))
    offset = rng.randrange(min(len(content), rng.choice([64, 64, len(content)])) + 1)
    return content[:offset] + packed + content[offset + num_bytes :]


def _replace_number(content: bytes, rng: random.Random) -> bytes:
    """Replace a decimal number by another number or by something else."""
    matches = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    if not matches:
        return _replace_binary_number(content, rng)
    match = rng.choice(matches)
    value = rng.choice(
        [b"-1", b"0", b"1000000000000000", b"9" * 30, b"9" * 5000, b"1e999", b"null", b'"x"', b"[]", b""]
    )
    return content[: match.start()] + value + content[match.end() :]


def _replace_value(content: bytes, rng: random.Random) -> bytes:
    """Change the type of a value in a JSON file, or delete or rename a key."""
    try:
        document = json.loads(content)
    except ValueError:
        return _flip_bits(content, rng)
    nodes: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        # Long lists and tables have items of one kind, so a sample is enough.
        for key in keys if len(keys) < 20 else rng.sample(list(keys), 20):
            nodes.append((node, key))
            if isinstance(node[key], dict | list):
                stack.append(node[key])
    if not nodes:
        return json.dumps(rng.choice(WRONG_VALUES)).encode()
    node, key = rng.choice(nodes)
    choice = rng.random()
    if isinstance(node, dict) and choice < 0.2:
        del node[key]
    elif isinstance(node, dict) and choice < 0.3:
        node[rng.choice(["x", "", "../x", "__class__"])] = node.pop(key)
    else:
        node[key] = rng.choice(WRONG_VALUES)
    return json.dumps(document).encode()
