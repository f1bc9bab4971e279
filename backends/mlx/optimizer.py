"""The optimizer: Muon for matrices, AdamW for the rest.

It is our own since both backends must take the same steps, and go on from each other's state.
torch.optim.Muon multiplies in bfloat16, which most CPUs do ten times slower than float32; the
tests compare with it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from backends.checkpoint import check_optimizer_state
from backends.mlx.adapters import trained_parameters
from backends.mlx.network import Transformer

Arrays = list[mx.array]


class Optimizer:
    """Muon for the matrices of the blocks and AdamW for the rest; or AdamW for all.

    Muon (Jordan 2024) takes the momentum of a matrix to the nearest orthogonal one, by five
    Newton-Schulz steps, and scales it by sqrt(max(1, rows / columns)). Matrices of one shape go
    through the iteration together. AdamW has no weight decay here, which makes it Adam (Kingma and
    Ba 2014); its betas are 0.9 and 0.98.

    muon: False: AdamW for all, as for pretrained models.
    seed: of dropout.
    """

    # Arrays of MLX don't change: what a step makes of weights lies beside what they were. So it
    # takes this many of them at a time.
    WEIGHTS_AT_ONCE = 1 << 22

    def __init__(self, network: Transformer, muon: bool = True, seed: int = 0) -> None:
        self.network = network
        self.seed = seed
        self.step_count = 0
        self.matrices: list[str] = []
        self.first_moments: dict[str, mx.array] = {}
        self.second_moments: dict[str, mx.array] = {}  # of AdamW alone
        for name, weight in trained_parameters(network).items():
            self.first_moments[name] = mx.zeros_like(weight)
            if muon and weight.ndim == 2 and ".layers." in name:
                self.matrices.append(name)
            else:
                self.second_moments[name] = mx.zeros_like(weight)
        self.groups = self._group_parameters()
        self.compiled_step: Callable[..., Any] = mx.compile(_step_of_group)

    def _group_parameters(self) -> list[list[str]]:
        """Return names in groups of WEIGHTS_AT_ONCE at most, or of one parameter that is larger.

        A group is all AdamW's, or matrices of one shape.
        """
        groups: list[list[str]] = []
        open_groups: dict[tuple[int, ...], list[str]] = {}
        open_sizes: dict[tuple[int, ...], int] = {}
        for name, moment in self.first_moments.items():
            kind = moment.shape if name in self.matrices else ()
            size = open_sizes.get(kind, 0) + moment.size
            if kind not in open_groups or size > self.WEIGHTS_AT_ONCE:
                open_groups[kind] = []
                groups.append(open_groups[kind])
                size = moment.size
            open_groups[kind].append(name)
            open_sizes[kind] = size
        return groups

    def _moments(self) -> dict[str, mx.array]:
        """Return all moments, by the names that they have in a saved state."""
        first = {f"m.{name}": moment for name, moment in self.first_moments.items()}
        second = {f"v.{name}": moment for name, moment in self.second_moments.items()}
        return first | second

    def state(self) -> dict[str, np.ndarray]:
        """Return step count and moments as arrays by name, as either twin reads them."""
        arrays = {"step": np.array([self.step_count])}
        for name, moment in self._moments().items():
            arrays[name] = np.array(moment)
        return arrays

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take what `state` returned.

        Raises KeyError for an entry that one of the two lacks, or that has another shape.
        """
        shapes = {name: tuple(moment.shape) for name, moment in self._moments().items()}
        check_optimizer_state(state, shapes)
        self.step_count = int(state["step"][0])
        for name in self.first_moments:
            self.first_moments[name] = mx.array(state[f"m.{name}"])
        for name in self.second_moments:
            self.second_moments[name] = mx.array(state[f"v.{name}"])

    def step(
        self,
        gradients: dict[str, mx.array],
        lr: float,
        muon_lr: float,
        momentum: float = 0.95,
        beta1: float = 0.9,
        beta2: float = 0.98,
        eps: float = 1e-8,
    ) -> None:
        """Change the weights by their gradients, which are given by name."""
        self.step_count += 1
        numbers = (lr, muon_lr, momentum, beta1, beta2, eps, self.step_count)
        # As arrays: a plain number would be compiled in.
        settings = [mx.array(float(number)) for number in numbers]
        parameters = trained_parameters(self.network)
        stores = (parameters, self.first_moments, self.second_moments, gradients)
        for names in self.groups:
            # They are popped, so that those of a group are gone before the next.
            old = [[store.pop(name) for name in names if name in store] for store in stores]
            weights, first, second = self.compiled_step(*old, *settings)
            mx.eval(weights, first, second)
            self.network.update(tree_unflatten(list(zip(names, weights, strict=True))))
            self.first_moments.update(zip(names, first, strict=True))
            if second:
                self.second_moments.update(zip(names, second, strict=True))


def _step_of_group(
    weights: Arrays,
    first: Arrays,
    second: Arrays,
    gradients: Arrays,
    lr: mx.array,
    muon_lr: mx.array,
    momentum: mx.array,
    beta1: mx.array,
    beta2: mx.array,
    eps: mx.array,
    step: mx.array,
) -> tuple[Arrays, Arrays, Arrays]:
    """Return the weights and moments of a group after a step.

    It has no effects, so that it can be compiled. Without second moments the step is Muon's.
    """
    if not second:
        weights, first = _step_muon(weights, first, gradients, muon_lr, momentum)
        return weights, first, second
    return _step_adamw(weights, first, second, gradients, lr, beta1, beta2, eps, step)


def _step_muon(
    weights: Arrays, moments: Arrays, gradients: Arrays, lr: mx.array, momentum: mx.array
) -> tuple[Arrays, Arrays]:
    moments = [
        momentum * moment + (1 - momentum) * gradient
        for moment, gradient in zip(moments, gradients, strict=True)
    ]
    # Nesterov's: the gradient counts once more.
    directions = [
        (1 - momentum) * gradient + momentum * moment
        for moment, gradient in zip(moments, gradients, strict=True)
    ]
    updates = orthogonalize(mx.stack(directions))
    rows, columns = weights[0].shape
    scale = lr * max(1, rows / columns) ** 0.5
    weights = [weight - scale * update for weight, update in zip(weights, updates, strict=True)]
    return weights, moments


def _step_adamw(
    weights: Arrays,
    first: Arrays,
    second: Arrays,
    gradients: Arrays,
    lr: mx.array,
    beta1: mx.array,
    beta2: mx.array,
    eps: mx.array,
    step: mx.array,
) -> tuple[Arrays, Arrays, Arrays]:
    first = [
        beta1 * moment + (1 - beta1) * gradient
        for moment, gradient in zip(first, gradients, strict=True)
    ]
    second = [
        beta2 * moment + (1 - beta2) * gradient.square()
        for moment, gradient in zip(second, gradients, strict=True)
    ]
    # Moments begin at zero, which is made up for.
    first_correction = 1 - beta1**step
    second_correction = 1 - beta2**step
    weights = [
        weight - lr * m / first_correction / (mx.sqrt(v / second_correction) + eps)
        for weight, m, v in zip(weights, first, second, strict=True)
    ]
    return weights, first, second


def orthogonalize(matrices: mx.array) -> mx.array:
    """Return the nearest orthogonal matrices, roughly, of a stack (n, rows, columns).

    It is Newton-Schulz with Muon's quintic coefficients. Singular values end between 0.7 and 1.2.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.swapaxes(1, 2) if is_tall else matrices
    # Not in bfloat16: most CPUs multiply that ten times slower.
    x = x / (mx.sqrt(x.square().sum((1, 2), keepdims=True)) + 1e-7)
    for _ in range(5):
        a = x @ x.swapaxes(1, 2)
        b = mx.addmm(a, a, a, alpha=2.0315, beta=-4.7750)
        x = mx.addmm(x, b, x, beta=3.4445)
    return x.swapaxes(1, 2) if is_tall else x
