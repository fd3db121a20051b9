"""Rotary embedding of packed sequences on a CPU: one rotation for all of them, angles looked up by a token's place.

Megatron's own cuts the row into its sequences and computes sine and cosine of all their angles, in every layer, for
queries and keys. Shape legend: T tokens, A heads, D numbers of a head, L positions of the longest sequence.
"""

import torch


def rotate_packed(
    t_TAD: torch.Tensor, places_T: torch.Tensor, angles_L11D: torch.Tensor, cp_size: int = 1, cp_rank: int = 0
) -> torch.Tensor:
    """[T, A, D]; stands where Megatron has Transformer Engine's `fused_apply_rotary_pos_emb_thd`.

    Args:
        places_T: each token's place in its sequence; where Transformer Engine takes the ends of sequences, see `PackedRow`.
        angles_L11D: of each place, [L, 1, 1, D]; both halves of a head turn by the same angles.
        cp_size, cp_rank: of the context-parallel ranks; the places are those of this one's tokens.
    """
    angles_LD = angles_L11D.flatten(1)
    sine_LD = angles_LD.sin()
    sine_LD[:, : sine_LD.shape[1] // 2].neg_()
    cosine_T1D, sine_T1D = (table[places_T].unsqueeze(1).to(t_TAD.dtype) for table in (angles_LD.cos(), sine_LD))
    return _Rotation.apply(t_TAD, cosine_T1D, sine_T1D)


class _Rotation(torch.autograd.Function):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), the first half's sine with its sign."""

    @staticmethod
    def forward(ctx, t_TAD, cosine_T1D, sine_T1D):
        ctx.save_for_backward(cosine_T1D, sine_T1D)
        return _rotate(t_TAD, cosine_T1D, sine_T1D)

    @staticmethod
    def backward(ctx, grad_TAD):
        cosine_T1D, sine_T1D = ctx.saved_tensors
        return _rotate(grad_TAD, cosine_T1D, -sine_T1D), None, None


def _rotate(t_TAD: torch.Tensor, cosine_T1D: torch.Tensor, sine_T1D: torch.Tensor) -> torch.Tensor:
    half = t_TAD.shape[-1] // 2
    swapped_TAD = torch.cat((t_TAD[..., half:], t_TAD[..., :half]), dim=-1)
    return swapped_TAD.mul_(sine_T1D).addcmul_(t_TAD, cosine_T1D)
