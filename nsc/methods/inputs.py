"""What a regression knows of the inputs x of a layer: their second moments, on rows of each task.

E_k      the mean over the tokens of task k's rows that count
u        [A_1 .. A_K] x,  of the factors as they are stored, without scales
x~       x, or what the merge so far makes of the same token
c_k      the unit that the method measures task k in
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nsc.methods.equations import Gram


class Inputs(NamedTuple):
    """What a method must know of the inputs x of each layer, on rows of each task k.

    Attributes:
        of: "u", the moments of u = [A_1 .. A_K] x alone, or "x", those of the inputs themselves.
        run: what x comes from: "experts", the base with adapter k alone; "below", the same behind the merge of all
            blocks below; or "merge", x of the experts and x~ of the merge so far, in rounds.
        unit: what the moments of a task are multiplied by: "one"; "norm", one over their Frobenius norm; or "output",
            |W_k|^2 / E_k |W_k x|^2 with the expert's weight W_k.
    """

    of: str
    run: str = "experts"
    unit: str = "one"


@dataclass(frozen=True)
class SpanMoments:
    """What is known of u = [A_1 .. A_K] x, of the factors as they are stored.

    Attributes:
        second: (K, R, R) float64, E_k[u u'] on rows of each task.
    """

    second: Tensor


@dataclass(frozen=True)
class InputMoments:
    """What is known of the inputs x of a layer, and of x~, which is x or what the merge so far makes of the same row.

    Each task's moments are multiplied by the unit c_k that the method's ``Inputs`` names. All are float64.

    Attributes:
        second: d wide, sum_k c_k E_k[x~ x~'].
        cross: (R, d), in the rows of adapter k c_k A_k E_k[x x~'].
        own: K of (r_k, r_k), c_k A_k E_k[x x'] A_k'.
        diagonals: (K, d) the diagonal of c_k E_k[x x~'].
        norms: (K, 2) Frobenius norms of c_k E_k[x x~'] and c_k E_k[x~ x~'].
    """

    second: Gram
    cross: Tensor
    own: tuple[Tensor, ...]
    diagonals: Tensor
    norms: Tensor
