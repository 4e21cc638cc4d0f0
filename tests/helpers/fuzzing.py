# SPDX-License-Identifier: Apache-2.0
"""Random damage to the bytes of files."""

import random

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1)


def mutated(content: bytes, rng: random.Random, codes: bytes) -> bytes:
    """Returns `content` with up to five changes; `codes` are bytes that the format interprets."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, other = rng.randrange(len(content)), rng.randrange(len(content))
        size, change = rng.choice((1, 2, 4, 8, 60)), rng.randrange(6)
        if change == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            content[at] = rng.choice(codes)
        elif change == 2:
            extreme = rng.choice(EXTREMES).to_bytes(8, rng.choice(("little", "big")))
            content[at : at + 8] = rng.choice([extreme, extreme[:size], extreme[-size:]])
        elif change == 3:
            del content[at : at + size]
        elif change == 4:
            content[at:at] = rng.randbytes(size)
        else:
            content[at:at] = content[other : other + size]
    return bytes(content)
