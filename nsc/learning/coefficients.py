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


def starts(stack: Stack, config: MergeConfig) -> Tensor:
    """Return where the coefficients start: at ``start``, and at 1 those of the merge that is started from.

    Args:
        stack: the adapters, with that merge as the last.
        config: start and start_from.

    Returns:
        (M, C) float32.
    """
    lam = torch.full(stack.owned.shape, config.start)
    if config.start_from is not None:
        for row, module in zip(lam, map(stack.modules.__getitem__, stack.names), strict=True):
            last = sum(module.ranks) if module.by_rank else len(module.ranks)
            row[last - (module.ranks[-1] if module.by_rank else 1) : last] = 1
    return lam


@dataclass(frozen=True)
class Coefficients:
    """The mapping from the optimised parameter theta to the coefficients lam (M, C).

    Attributes:
        owned: (M, C) bool, which coefficients exist; the others stay at ``start``.
        start: initial value of every coefficient, or of each (M, C), for the identity alone.
        link: one of LINKS, or "softmax".
        shared: whether all modules have the same coefficients, so that theta is (1, C).
    """

    owned: Tensor
    start: float | Tensor
    link: str = "identity"
    shared: bool = False

    @classmethod
    def of(cls, stack: Stack, config: MergeConfig) -> Coefficients:
        """Return the mapping for a stack.

        Args:
            stack: the adapters, ``by_rank`` if the granularity is "rank".
            config: start, link and granularity.

        Returns:
            The mapping.
        """
        start = starts(stack, config) if config.start_from is not None else config.start
        return cls(stack.owned, start, config.link, config.granularity == "task")

    def to(self, device: torch.device) -> Coefficients:
        """Return the same mapping on a device.

        Args:
            device: where theta lies.

        Returns:
            The mapping.
        """
        start = self.start.to(device) if isinstance(self.start, Tensor) else self.start
        return replace(self, owned=self.owned.to(device), start=start)

    def first(self, dtype: torch.dtype) -> Tensor:
        """Return the theta at which every coefficient is ``start``.

        Args:
            dtype: dtype of theta.

        Returns:
            (M, C), or (1, C) where modules share their coefficients.
        """
        rows, columns = self.owned.shape
        lam = torch.zeros(1 if self.shared else rows, columns, dtype=dtype, device=self.owned.device)
        lam += self._first_of(lam)
        return torch.zeros_like(lam) if self.link == "softmax" else LINKS[self.link][1](lam)

    def __call__(self, theta: Tensor) -> Tensor:
        """Return the coefficients.

        Args:
            theta: the optimised parameter, of the shape that ``first`` gives.

        Returns:
            (M, C), differentiable in ``theta``.
        """
        return self._of_rows(theta).expand(self.owned.shape[0], -1)

    def by_row(self, each: Tensor) -> Tensor:
        """Bring a property of coefficients to the shape of theta.

        Args:
            each: (M, C) bool.

        Returns:
            Of theta's shape: whether it holds for every coefficient that an entry of theta stands for.
        """
        return (each | ~self.owned).all(0, keepdim=True) if self.shared else each

    def box(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bounds of theta that keep coefficients within reach of ``start``.

        Args:
            reach: how far a coefficient may be from ``start``, of theta's shape.

        Returns:
            Least and greatest theta, both of theta's shape; infinite under softmax.
        """
        if self.link == "softmax":
            return torch.full_like(reach, float("-inf")), torch.full_like(reach, float("inf"))
        inverse, start = LINKS[self.link][1], self._first_of(reach)
        return inverse(start - reach), inverse(start + reach)

    @torch.no_grad()
    def draw_back(self, theta: Tensor, reach: Tensor) -> None:
        """Under softmax, draw rows that went further than ``reach`` back towards their start.

        Args:
            theta: changed in place; nothing else is moved.
            reach: how far a coefficient may be from ``start``, of theta's shape.
        """
        if self.link != "softmax":
            return
        lam = self._of_rows(theta)
        gone = (lam - self.start).abs().amax(1, keepdim=True).clamp_min(torch.finfo(lam.dtype).tiny)
        kept = reach.amax(1, keepdim=True) / gone
        back = (self.start + kept * (lam - self.start)).log()
        theta.copy_(torch.where((kept < 1) & self._rows_owned(), back, theta))

    @torch.no_grad()
    def stopped(self, theta: Tensor, reach: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Return which coefficients a bound holds.

        Args:
            theta: at the end.
            reach: how far a coefficient may be from ``start``, of theta's shape.
            lower: lower bound of theta, as ``box`` gives it.
            upper: upper bound of theta, as ``box`` gives it.

        Returns:
            (M, C) bool.
        """
        if self.link == "softmax":
            lam = self._of_rows(theta)
            held = (lam - self.start).abs() >= reach.amax(1, keepdim=True) * (1 - 1e-6)
        else:
            held = (theta <= lower) | (theta >= upper)
        return held.expand(self.owned.shape[0], -1) & self.owned

    def _first_of(self, theta: Tensor) -> float | Tensor:
        """The start, in the rows and dtype of theta."""
        return self.start[: len(theta)].to(theta) if isinstance(self.start, Tensor) else self.start

    def _rows_owned(self) -> Tensor:
        return self.owned.any(0, keepdim=True) if self.shared else self.owned

    def _of_rows(self, theta: Tensor) -> Tensor:
        if self.link != "softmax":
            return LINKS[self.link][0](theta)
        owned = self._rows_owned()
        share = theta.masked_fill(~owned, float("-inf")).softmax(1)
        return (share * owned.sum(1, keepdim=True) * self.start).masked_fill(~owned, self.start)
