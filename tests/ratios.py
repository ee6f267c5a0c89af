"""Memory beside the reference, from the benchmark's records: {key: {peer: record}}."""


def ratios(rows, field="temp_bytes"):
    """Returns ours to jax.nn's, or for prelu to Flax's, of each row."""
    return {
        key: peers["jaxrelu"][field] / (peers.get("jax.nn") or peers["flax"])[field]
        for key, peers in rows.items()
        if "jaxrelu" in peers
    }


def above(limit, found):
    return {key: round(ratio, 3) for key, ratio in found.items() if ratio > limit}
