import pytest
from hf_models import HFModel, make_hf_model


@pytest.fixture
def make_model(tmp_path_factory: pytest.TempPathFactory):
    """Writes a small Hugging Face model of random bits; see `make_hf_model`."""

    def make(family: str = "llama", **settings) -> HFModel:
        return make_hf_model(tmp_path_factory.mktemp("models") / family, family, **settings)

    return make
