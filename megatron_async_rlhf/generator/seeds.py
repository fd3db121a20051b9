"""Seeds of samplers."""

import hashlib


def request_seed(*identity: object) -> int:
    """A sampler seed that depends on nothing but what is being sampled: run seed, stage, step, position."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
