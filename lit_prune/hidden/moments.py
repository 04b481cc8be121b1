"""What makes up for the dimensions that are gone: least squares between a norm's outputs before and after.

n are the outputs of a norm in the unpruned model, m those of the same norm in the narrow one.
Suffixes: P unmasked positions, D full width of the stream, K dimensions that stay, O outputs, N vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune import distributed
from lit_prune.shrink.units.obs import factorised


class Moments:
    """The second moments of n and m over all tokens, in float64.

    Attributes:
        cross_DK: Mean of n m^T.
        gram_KK: Mean of m m^T.
    """

    def __init__(self, full: int, width: int) -> None:
        self.cross_DK = torch.zeros(full, width, dtype=torch.float64)
        self.gram_KK = torch.zeros(width, width, dtype=torch.float64)
        self.tokens = 0

    def update(self, full_PD: Tensor, narrow_PK: Tensor) -> None:
        """Adds the positions of a batch, in fp32."""
        full_PD, narrow_PK = full_PD.float(), narrow_PK.float()
        self.cross_DK += (full_PD.T @ narrow_PK).cpu()
        self.gram_KK += (narrow_PK.T @ narrow_PK).cpu()
        self.tokens += len(narrow_PK)

    def mean(self) -> Moments:
        """Returns the means over the tokens of all processes."""
        tokens = max(1, distributed.all_reduce_count(self.tokens))
        mean = Moments(*self.cross_DK.shape)
        mean.cross_DK = distributed.all_reduce_sum(self.cross_DK) / tokens
        mean.gram_KK = distributed.all_reduce_sum(self.gram_KK) / tokens
        mean.tokens = tokens
        return mean

    def scaled(self, scale: float) -> Moments:
        """Returns the moments for a narrow norm whose weight is multiplied by ``scale``."""
        scaled = Moments(*self.cross_DK.shape)
        scaled.cross_DK, scaled.gram_KK, scaled.tokens = scale * self.cross_DK, scale**2 * self.gram_KK, self.tokens
        return scaled


def scale_of_norm(moments: Moments, kept_K: Tensor) -> float:
    """Returns the factor c that minimises the mean of |n_K - c m|^2, n_K the kept entries of n.

    An RMS norm divides by the root of a mean over fewer squares than before. If half of the dimensions are gone, which
    were 0, that mean has doubled, and c is sqrt(2).
    """
    energy = float(moments.gram_KK.trace())
    return float(moments.cross_DK[kept_K].diagonal().sum()) / energy if energy else 1.0


def compensation(moments: Moments, kept_K: Tensor, damping: float) -> Tensor:
    """Returns M that minimises the mean of |n - M m|^2 + damping * |M - S|^2, shape (D, K).

    A linear of weight W that read n then reads m with W M. S is the selection of the kept dimensions, W S the kept
    columns of W, and the damping is relative to the mean of the Gram matrix's diagonal. If n_2 = n_1 in all tokens and
    dimension 2 is gone, M is [[1], [1]] without damping.
    """
    width = len(kept_K)
    selection_DK = torch.zeros_like(moments.cross_DK)
    selection_DK[kept_K, torch.arange(width)] = 1.0
    rest_DK = moments.cross_DK - selection_DK @ moments.gram_KK
    _, factor_KK = factorised(moments.gram_KK, torch.arange(width)[:, None], damping)
    return selection_DK + torch.cholesky_solve(rest_DK.T, factor_KK).T


def scales_for_tied_head(moments: Moments, kept_K: Tensor, embedding_ND: Tensor, damping: float) -> Tensor:
    """Returns the factors d of the last norm's weight that minimise the mean of |E n - E_K (d m)|^2, shape (K,).

    A head that is tied to the embedding E cannot make up for anything itself. The normal equations are
    ((E_K^T E_K) * G) d = diag(E_K^T E C), with the moments G = m m^T and C = n m^T; they are damped towards 1.
    """
    product_KD = torch.zeros(len(kept_K), embedding_ND.shape[1], dtype=torch.float64)
    for rows_ND in embedding_ND.split(8192):  # to avoid a float64 copy of the whole embedding
        wide_ND = rows_ND.detach().cpu().double()
        product_KD += wide_ND[:, kept_K].T @ wide_ND
    normal_KK = product_KD[:, kept_K] * moments.gram_KK
    right_K = (product_KD * moments.cross_DK.T).sum(1)
    ridge = damping * float(normal_KK.diagonal().mean()) or 1.0
    normal_KK.diagonal().add_(ridge)
    return torch.linalg.solve(normal_KK, right_K + ridge)
