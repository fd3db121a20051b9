import pytest
import torch

from megatron_async_rlhf.formats.digest import _BLOCK_BYTES, digest, digest_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_every_flipped_bit_changes_it(dtype: torch.dtype):
    tensor = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    before = digest(tensor)
    assert len(before) == 16
    seen = {before}
    raw = tensor.view(-1).view(torch.uint8)
    for byte in range(raw.numel()):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            seen.add(digest(tensor))
            raw[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * raw.numel()
    assert digest(tensor) == before


def test_a_bit_flipped_far_into_a_large_tensor_changes_it():
    tensor = torch.zeros(1_000_003)
    before = digest(tensor)
    for byte in (0, 1_999_999, 4_000_011):
        tensor.view(torch.uint8)[byte] ^= 1
        assert digest(tensor) != before
        tensor.view(torch.uint8)[byte] ^= 1


def test_strides_do_not_matter():
    tensor = torch.randn(6, 10)
    spread = torch.empty(10, 20, 6)[:, 3].t().copy_(tensor)
    assert not spread.is_contiguous()
    assert digest(spread) == digest(tensor)
    assert digest(torch.randn(9, 10)[3:].copy_(tensor)) == digest(tensor)
    assert digest(tensor.t()) != digest(tensor)


def test_shapes_and_gradients_are_not_part_of_it():
    tensor = torch.randn(6, 10)
    assert digest(tensor.view(3, 20)) == digest(tensor)
    assert digest(torch.nn.Parameter(tensor)) == digest(tensor)
    assert digest(torch.tensor(1.5)) == digest(torch.tensor([1.5]))


def test_what_is_hashed_in_blocks_is_what_is_hashed_whole():
    wide = torch.randn(3000, 200)
    part = wide[:, 17:149]
    assert part.nbytes > 10 * _BLOCK_BYTES["cpu"]
    assert digest(part) == digest(part.contiguous())
    assert digest(part, torch.bfloat16) == digest(part.bfloat16().contiguous()) != digest(part)
    assert digest(torch.randn(0, 5)) == digest(torch.randn(0, 7))


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_blocks_of_rows_give_the_digest_of_the_whole(rows: int):
    tensor = torch.randn(7, 5)
    assert digest_blocks(tensor.split(rows)) == digest(tensor)
    assert digest_blocks(reversed(tensor.split(3))) != digest(tensor)
