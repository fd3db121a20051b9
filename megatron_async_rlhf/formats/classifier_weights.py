"""Whether a directory has the weights of a classifier, its head above all. Only headers of files are read. No torch."""

from pathlib import Path

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.safetensors_files import find_weights
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.classifier import Classifier

_HEAD = "score.weight"  # of decoders; the heads of encoders are called classifier, and have several parts
_ENCODER_HEAD = "classifier."


def classifier_numbers(key: str, directory: Path, classifier: Classifier) -> int:
    """How many numbers all its weights are.

    Args:
        key: of the directory in the configuration.

    Raises:
        CheckpointError: weights are missing or broken, or there is no head for one score.
    """
    try:
        found = find_weights(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from None
    head = found.get(_HEAD)
    if head is None and not any(name.startswith(_ENCODER_HEAD) for name in found):
        raise CheckpointError(
            f"{key} = {directory}: its weights have no {_HEAD}, which makes a score of what the model has read: they are those "
            "of a language model; give one that was trained as a reward model"
        )
    if head is not None and head.spec.shape != (1, classifier.hidden_size):
        raise CheckpointError(
            f"{key} = {directory}: {_HEAD} has the shape {list(head.spec.shape)}, not [1, {classifier.hidden_size}]; the "
            "weights do not belong to this config.json"
        )
    return sum(place.spec.num_bytes // ITEM_BYTES[place.spec.dtype] for place in found.values())
