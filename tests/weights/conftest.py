import pytest

from megatron_async_rlhf.models.architecture import Architecture


@pytest.fixture
def make_arch():
    """Builds a small architecture; every size may be given."""

    def make(**sizes) -> Architecture:
        heads = sizes.get("heads", 4)
        defaults = {
            "vocab_size": 61, "layers": 4, "hidden_size": 16, "ffn_size": 24, "heads": heads, "kv_heads": heads,
            "head_dim": 4, "context_length": 32, "rope_theta": 10000.0, "norm_eps": 1e-5, "tie_embeddings": False,
        }  # fmt: skip
        return Architecture(**defaults | sizes)

    return make
