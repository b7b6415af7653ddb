"""One way to define an op: a torch reference that is schema, fake, CPU kernel and oracle, and a Triton launch."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from nsc_kernels._tl import HAS_TRITON, INTERPRET

PLAIN = {Tensor, nn.Parameter}  # anything else may stand for a tensor without being one


class Launch(NamedTuple):
    """A kernel with everything that it is called with.

    A run and a compilation ahead of time read the same fields.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: programs along each axis.
        args: parameter of the kernel -> tensor, number or None.
        settings: block sizes, and Triton's ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    settings: dict[str, int]

    def run(self) -> None:
        """Launch the kernel on the current stream of the device that holds the arguments, unless the grid is empty."""
        if 0 in self.grid:
            return
        device = next(value for value in self.args.values() if isinstance(value, Tensor)).device
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            self.kernel[self.grid](**self.args, **self.settings)
        else:
            with torch.cuda.device(device):
                self.kernel[self.grid](**self.args, **self.settings)


def without_autocast(function: Callable) -> Callable:
    """Keep autocast from changing the dtypes in which a function computes.

    Args:
        function: takes at least one tensor, by position.

    Returns:
        The same function with autocast disabled on the device of its first tensor.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


class Op:
    """An operator that can be called in two ways: as a registered torch operator, or directly.

    Compilers, modes and transforms see the registered operator. A call on plain tensors goes directly to the kernel,
    past torch's dispatcher, which in Python costs more than a launch; values and gradients are the same. Triton runs on
    CUDA and ROCm, and on the CPU under ``TRITON_INTERPRET=1``; float64 always takes the reference.

    Attributes:
        reference: the plain torch function: schema, fake, CPU kernel and test oracle.
        launch: the same by Triton.
        registered: the ``torch.library`` operator.
        function, transformable: autograd functions of the direct way, the second for ``torch.func``; None without
            gradient.

    Args:
        name: of the registered operator, "namespace::name".
        reference: in plain torch; its annotations are the schema.
        launch: takes the same positional arguments; both return fresh contiguous tensors.
    """

    def __init__(self, name: str, reference: Callable, launch: Callable) -> None:
        self.reference = without_autocast(reference)
        self.launch = launch
        self.function: Any = None
        self.transformable: Any = None
        self.registered = custom_op(name, self.reference, mutates_args=())
        self.registered.register_fake(self.reference)
        if HAS_TRITON:
            self.registered.register_kernel(["cpu", "cuda"] if INTERPRET else "cuda")(self.direct)

    def differentiable(self, save: Callable, backward: Callable) -> None:
        """Give the operator a gradient, the same in both ways; it can be differentiated once.

        Args:
            save: ``save(ctx, inputs, output)`` keeps what the backward needs.
            backward: ``backward(ctx, *gradients)`` returns a gradient or None for each input.
        """
        self.registered.register_autograd(backward, setup_context=save)
        once = once_differentiable(backward)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.direct(*args)
            save(ctx, args, output)
            return output

        # torch.func needs a context set up apart, which makes torch look at the signature in every call
        self.transformable = self._function(forward=self.direct, setup_context=save, backward=once)
        self.function = self._function(forward=forward, backward=once)

    def _function(self, **rules: Callable) -> Any:
        name = self.registered._qualname.replace("::", "_")
        return type(name, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in rules.items()})

    def __call__(self, *args: Any) -> Any:
        """Call the operator in the way that suits the arguments.

        Args:
            args: as the reference takes them.

        Returns:
            What the reference returns.

        Raises:
            NotImplementedError: if it has a gradient and an argument carries a tangent of forward-mode differentiation.
        """
        if self.function is not None:
            refuse_tangents(self.registered._qualname, args)
        if self.function is not None and torch._C._are_functorch_transforms_active():
            return self.transformable.apply(*args)  # torch.func does not know the gradient of a registered operator
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if is_traced(tensors):
            return self.registered(*args)
        if self.function is not None and torch.is_grad_enabled() and any([x.requires_grad for x in tensors]):
            return self.function.apply(*args)
        return self.direct(*args)

    def direct(self, *args: Any) -> Any:
        """Compute the values alone, by Triton where it runs and by the reference elsewhere.

        While a profiler runs, the call opens a range with the operator's name.

        Args:
            args: as the reference takes them.

        Returns:
            What the reference returns, without a gradient.
        """
        function = self.launch if runs_triton(args) else self.reference
        if not torch.autograd._profiler_enabled():
            return function(*args)
        with torch.profiler.record_function(self.registered._qualname):
            return function(*args)


def runs_triton(args: tuple[Any, ...]) -> bool:
    """Return whether a call goes to a Triton kernel.

    Args:
        args: of the call; at least one is a tensor.

    Returns:
        True on a GPU or under ``TRITON_INTERPRET=1``, if Triton is installed and no tensor is float64.
    """
    if not HAS_TRITON:
        return False
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return (INTERPRET or tensors[0].is_cuda) and torch.float64 not in [x.dtype for x in tensors]


def refuse_tangents(name: str, args: Iterable[Any]) -> None:
    """Refuse forward-mode differentiation, since a kernel would drop the tangents.

    Args:
        name: of the operator, for the message.
        args: of the call, tensors or not.

    Raises:
        NotImplementedError: if one of them is a dual tensor.
    """
    if forward_ad._current_level < 0:
        return
    if any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative; differentiate in reverse mode, by backward() or torch.func.vjp"
        )


def fresh(like: Tensor, shape: Sequence[int] | int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised contiguous tensor for a kernel to fill.

    Args:
        like: a tensor on the device where it must be.
        shape: its shape, or its length.
        dtype: its dtype; that of ``like`` by default.

    Returns:
        The tensor.
    """
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def is_traced(tensors: Iterable[Tensor]) -> bool:
    """Return whether a compiler, a transform, a mode or a tensor subclass must see the registered operator.

    Args:
        tensors: the tensors of the call.

    Returns:
        False for plain tensors and parameters outside of all of these.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or not {type(x) for x in tensors} <= PLAIN
    )
