"""Fused operations for null-space compression of LoRA adapters, on torch and, where it is installed, Triton.

The shapes have the same names everywhere:

    z (n, d)   rows entering a linear layer          A_k, B_k (r_k, d), (m, r_k)   the factors of adapter k
    u (n, R)   z A', all adapters stacked            lam (K,)                      coefficients, s_k the LoRA scales
    G (R, R)   block-diagonal (A_k A_k')^-1          R = sum r_k; segment k is offsets[k]:offsets[k+1]
"""

from nsc_kernels.dense import MergedDenseLinear
from nsc_kernels.gram import GramCache, GramFactor, gram_inverse
from nsc_kernels.lora_down import lora_down, lora_fork
from nsc_kernels.lora_fold import lora_fold
from nsc_kernels.lora_moments import Moments, lora_moments
from nsc_kernels.lora_up import lora_up
from nsc_kernels.modules import MergedLoRALinear, Siblings
from nsc_kernels.null_space_ratio import null_space_ratio
from nsc_kernels.ratio_from_energy import ratio_from_energy

__version__ = "0.1.0"
__all__ = [
    "GramCache",
    "GramFactor",
    "MergedDenseLinear",
    "MergedLoRALinear",
    "Moments",
    "Siblings",
    "gram_inverse",
    "lora_down",
    "lora_fold",
    "lora_fork",
    "lora_moments",
    "lora_up",
    "null_space_ratio",
    "ratio_from_energy",
]
