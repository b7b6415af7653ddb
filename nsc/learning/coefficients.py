"""From the parameter that is optimised to the coefficients: one mapping, for the forward and for what is written.

    lam = link(theta)        theta (M, C); at granularity "task" (1, C), the same row for every module

    identity  theta        softplus  log(1 + e^theta)        sigmoid  1/(1 + e^-theta)        exp  e^theta
    clip      theta within [0, 1], without gradient outside
    softmax   K start softmax(theta) over the K tasks that have the module

Every link starts where all coefficients are ``start``, and a bound is one of coefficients: each stays within its reach
of ``start``. Under softmax a row that went too far is drawn back towards its start as a whole, which keeps its sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsc.adapters.stack import Stack
from nsc.config import MergeConfig

Link = Callable[[Tensor], Tensor]
# Of each link but softmax: itself, and its inverse, infinite at the ends of an open range.
LINKS: dict[str, tuple[Link, Link]] = {
    "identity": (lambda theta: theta, lambda lam: lam),
    "softplus": (
        lambda theta: torch.logaddexp(theta, torch.zeros_like(theta)),
        lambda lam: lam.clamp_min(0) + (-torch.expm1(-lam.clamp_min(0))).log(),
    ),
    "sigmoid": (torch.sigmoid, lambda lam: lam.clamp(0, 1).logit()),
    "exp": (torch.exp, lambda lam: lam.clamp_min(0).log()),
    "clip": (lambda theta: theta.clamp(0, 1), lambda lam: lam),
}


@dataclass(frozen=True)
class Coefficients:
    """theta -> lam (M, C).

    owned: (M, C) bool, which coefficients there are; those that there are not stay at ``start``.  shared: whether all
    modules have the same ones, so that theta is (1, C).
    """

    owned: Tensor
    start: float
    link: str = "identity"
    shared: bool = False

    @classmethod
    def of(cls, stack: Stack, config: MergeConfig) -> Coefficients:
        """Those of a stack, which is ``by_rank`` where the granularity is."""
        return cls(stack.owned, config.start, config.link, config.granularity == "task")

    def to(self, device: torch.device) -> Coefficients:
        """The same on a device."""
        return replace(self, owned=self.owned.to(device))

    def first(self, dtype: torch.dtype) -> Tensor:
        """theta at which every coefficient is ``start``."""
        rows, columns = self.owned.shape
        lam = torch.full((1 if self.shared else rows, columns), self.start, dtype=dtype, device=self.owned.device)
        return torch.zeros_like(lam) if self.link == "softmax" else LINKS[self.link][1](lam)

    def __call__(self, theta: Tensor) -> Tensor:
        """(M, C) coefficients, differentiable in ``theta``."""
        return self._of_rows(theta).expand(self.owned.shape[0], -1)

    def by_row(self, each: Tensor) -> Tensor:
        """(M, C) bool -> of theta's shape: where it holds for every coefficient that a value of theta stands for."""
        return (each | ~self.owned).all(0, keepdim=True) if self.shared else each

    def box(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest theta of coefficients within ``reach`` of the start, both of theta's shape."""
        if self.link == "softmax":
            return torch.full_like(reach, float("-inf")), torch.full_like(reach, float("inf"))
        inverse = LINKS[self.link][1]
        return inverse(self.start - reach), inverse(self.start + reach)

    @torch.no_grad()
    def draw_back(self, theta: Tensor, reach: Tensor) -> None:
        """Under softmax, take back what of ``theta`` leads further than ``reach``; in place, nothing else is moved."""
        if self.link != "softmax":
            return
        lam = self._of_rows(theta)
        gone = (lam - self.start).abs().amax(1, keepdim=True).clamp_min(torch.finfo(lam.dtype).tiny)
        kept = reach.amax(1, keepdim=True) / gone
        back = (self.start + kept * (lam - self.start)).log()
        theta.copy_(torch.where((kept < 1) & self._rows_owned(), back, theta))

    @torch.no_grad()
    def stopped(self, theta: Tensor, reach: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """(M, C) bool: the coefficients that a bound holds."""
        if self.link == "softmax":
            lam = self._of_rows(theta)
            held = (lam - self.start).abs() >= reach.amax(1, keepdim=True) * (1 - 1e-6)
        else:
            held = (theta <= lower) | (theta >= upper)
        return held.expand(self.owned.shape[0], -1) & self.owned

    def _rows_owned(self) -> Tensor:
        return self.owned.any(0, keepdim=True) if self.shared else self.owned

    def _of_rows(self, theta: Tensor) -> Tensor:
        if self.link != "softmax":
            return LINKS[self.link][0](theta)
        owned = self._rows_owned()
        share = theta.masked_fill(~owned, float("-inf")).softmax(1)
        return (share * owned.sum(1, keepdim=True) * self.start).masked_fill(~owned, self.start)
