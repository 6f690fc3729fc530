"""Names of blocks by their content, so that equal prefixes of different requests are found to be equal.

A block's keys and values depend on its tokens, on all tokens before it, on the model and on nothing else.
So its name is a hash of its tokens and of the name of the block before it; the first block's predecessor is
a root that stands for the model and for the salt. Two requests with different salts never share a block,
and so cannot find out by timing what the other one has sent.

Names are SHA-256 hashes: two contents of one name are not to be expected, so tokens are not compared.
"""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

__all__ = ["digest_of", "digests_of", "root_digest"]


def root_digest(*, revision: str, block_length: int, salt: str = "") -> bytes:
    """What stands before the first block.

    Args:
        revision: The model whose keys and values they are; another one's must have another name.
        block_length: Positions of a block.
        salt: Requests share blocks only with those of their own salt.
    """
    parts = (revision.encode(), str(block_length).encode(), salt.encode())
    return sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


def digest_of(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of the block of ``tokens`` behind the one named ``before``."""
    return sha256(before + np.asarray(tokens, dtype="<i8").tobytes()).digest()


def digests_of(root: bytes, tokens: Sequence[int], *, block_length: int) -> list[bytes]:
    """The names of all whole blocks of ``tokens``, in order."""
    names: list[bytes] = []
    for start in range(0, len(tokens) // block_length * block_length, block_length):
        names.append(digest_of(names[-1] if names else root, tokens[start : start + block_length]))
    return names
