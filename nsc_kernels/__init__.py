"""Fused operations for null-space compression of LoRA adapters. Imports torch, triton (if there is one), nothing else.

One alphabet of shapes everywhere:

    z (n, d)   rows entering a linear layer          A_k, B_k (r_k, d), (m, r_k)   the factors of adapter k
    u (n, R)   z A', all adapters stacked            lam (K,)                      coefficients, s_k the LoRA scales
    G (R, R)   block-diagonal (A_k A_k')^-1          R = sum r_k; segment k is offsets[k]:offsets[k+1]
"""

from nsc_kernels.gram import GramCache, GramFactor
from nsc_kernels.modules import MergedLoRALinear
from nsc_kernels.null_space_ratio import null_space_ratio

__version__ = "0.1.0"
__all__ = ["GramCache", "GramFactor", "MergedLoRALinear", "null_space_ratio"]
