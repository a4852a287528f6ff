"""Every hash and key that sites and coordinator must derive alike.

The hashes form a chain: context -> keys (all signed one-time keys) -> peers (who sent shares) -> survivors (whose
vectors are summed, with the vectors' hashes). Who confirms the last has confirmed all before it. Keys of shares and
masks are derived under the second: sites that were shown different adapters, configurations or lists of keys share no
key.
"""

from collections.abc import Mapping, Sequence

from common.secure_sum.primitives import Label, PrivateKey, derive, digest, shared_secret

__all__ = [
    "SHARE_NONCE",
    "hash_keys",
    "hash_peers",
    "hash_survivors",
    "hash_vector",
    "pair_mask_key",
    "seed_commitment",
    "self_mask_key",
    "share_context",
    "share_key",
]

# A share key belongs to one sender, one receiver and one list of fresh keys, and seals one message.
SHARE_NONCE = bytes(12)


def _id(site: int) -> bytes:
    return site.to_bytes(2, "little")


def hash_keys(context: bytes, advertised: Sequence[bytes]) -> bytes:
    """Of the context and all signed Advertise messages, in order of site."""
    return digest(Label.KEYS, context, *advertised)


def hash_peers(keys_hash: bytes, peers: Sequence[int]) -> bytes:
    """Of the keys and the sites that sent shares, in order."""
    return digest(Label.PEERS, keys_hash, *(_id(site) for site in peers))


def hash_survivors(peers_hash: bytes, vector_hashes: Mapping[int, bytes]) -> bytes:
    """Of the peers and the survivors with the hashes of their masked vectors."""
    return digest(Label.SURVIVORS, peers_hash, *(_id(site) + vector_hashes[site] for site in sorted(vector_hashes)))


def hash_vector(vector: bytes | memoryview) -> bytes:
    """Of a masked vector's bytes."""
    return digest(Label.VECTOR, vector)


def seed_commitment(context: bytes, site: int, seed: bytes) -> bytes:
    """Binds a site to its seed before anyone shares; 32 random bytes hide behind their hash."""
    return digest(Label.SEED_COMMITMENT, context, _id(site), seed)


def share_key(private: bytes | PrivateKey, public: bytes, keys_hash: bytes, *, sender: int, receiver: int) -> bytes:
    """Key under which `sender` seals its shares for `receiver`; each direction has its own."""
    return derive(shared_secret(private, public), Label.SHARE_KEY, keys_hash, _id(sender), _id(receiver))


def share_context(context: bytes, *, sender: int, receiver: int) -> bytes:
    """Associated data of sealed shares."""
    return context + _id(sender) + _id(receiver)


def pair_mask_key(private: bytes | PrivateKey, public: bytes, keys_hash: bytes, one: int, other: int) -> bytes:
    """Key of the mask between two sites, which one adds and the other takes away."""
    low, high = sorted((one, other))
    return derive(shared_secret(private, public), Label.PAIR_MASK, keys_hash, _id(low), _id(high))


def self_mask_key(seed: bytes, keys_hash: bytes, site: int) -> bytes:
    """Key of the mask that a site adds for itself."""
    return derive(seed, Label.SELF_MASK, keys_hash, _id(site))
