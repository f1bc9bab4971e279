"""The optimizer: Muon for matrices, AdamW for the rest.

It is our own since both backends must take the same steps, and go on from each other's state.
torch.optim.Muon multiplies in bfloat16, which most CPUs do ten times slower than float32; the
tests compare with it.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from backends.checkpoint import check_optimizer_state
from backends.torch.adapters import trained_parameters
from backends.torch.network import Transformer


class Optimizer:
    """Muon for the matrices of the blocks and AdamW for the rest; or AdamW for all.

    Muon (Jordan 2024) takes the momentum of a matrix to the nearest orthogonal one, by five
    Newton-Schulz steps, and scales it by sqrt(max(1, rows / columns)). Matrices of one shape go
    through the iteration together. AdamW has no weight decay here, which makes it Adam (Kingma and
    Ba 2014); its betas are 0.9 and 0.98.

    muon: False: AdamW for all, as for pretrained models.
    seed: of dropout.
    """

    def __init__(self, network: Transformer, muon: bool = True, seed: int = 0) -> None:
        self.network = network
        self.seed = seed
        self.step_count = 0
        self.matrices: list[str] = []
        self.first_moments: dict[str, Tensor] = {}
        self.second_moments: dict[str, Tensor] = {}  # of AdamW alone
        for name, weight in trained_parameters(network).items():
            self.first_moments[name] = torch.zeros_like(weight)
            if muon and weight.dim() == 2 and ".layers." in name:
                self.matrices.append(name)
            else:
                self.second_moments[name] = torch.zeros_like(weight)

    def _moments(self) -> dict[str, Tensor]:
        """Return all moments, by the names that they have in a saved state."""
        first = {f"m.{name}": moment for name, moment in self.first_moments.items()}
        second = {f"v.{name}": moment for name, moment in self.second_moments.items()}
        return first | second

    def state(self) -> dict[str, np.ndarray]:
        """Return step count and moments as arrays by name, as either twin reads them."""
        arrays = {"step": np.array([self.step_count])}
        for name, moment in self._moments().items():
            arrays[name] = moment.cpu().numpy()
        return arrays

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take what `state` returned.

        Raises KeyError for an entry that one of the two lacks, or that has another shape.
        """
        shapes = {name: tuple(moment.shape) for name, moment in self._moments().items()}
        check_optimizer_state(state, shapes)
        self.step_count = int(state["step"][0])
        device = self.network.device
        for name in self.first_moments:
            self.first_moments[name] = torch.tensor(state[f"m.{name}"], device=device)
        for name in self.second_moments:
            self.second_moments[name] = torch.tensor(state[f"v.{name}"], device=device)

    @torch.no_grad()
    def step(
        self,
        gradients: dict[str, Tensor],
        lr: float,
        muon_lr: float,
        momentum: float = 0.95,
        beta1: float = 0.9,
        beta2: float = 0.98,
        eps: float = 1e-8,
    ) -> None:
        """Change the weights by their gradients, which are given by name."""
        self.step_count += 1
        parameters = trained_parameters(self.network)
        self._step_muon(parameters, gradients, muon_lr, momentum)
        self._step_adamw(parameters, gradients, lr, beta1, beta2, eps)

    def _step_muon(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        lr: float,
        momentum: float,
    ) -> None:
        names_of_shape: dict[torch.Size, list[str]] = {}
        directions = {}
        for name in self.matrices:
            gradient = gradients[name]
            moment = self.first_moments[name].lerp_(gradient, 1 - momentum)
            # Nesterov's: the gradient counts once more.
            directions[name] = gradient.lerp(moment, momentum)
            names_of_shape.setdefault(moment.shape, []).append(name)
        for shape, names in names_of_shape.items():
            updates = orthogonalize(torch.stack([directions[name] for name in names]))
            rows, columns = shape
            scale = lr * max(1, rows / columns) ** 0.5
            for name, update in zip(names, updates, strict=True):
                parameters[name].sub_(update, alpha=scale)

    def _step_adamw(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
    ) -> None:
        # Moments begin at zero, which is made up for.
        first_correction = 1 - beta1**self.step_count
        second_correction = 1 - beta2**self.step_count
        names = list(self.second_moments)
        if not names:
            return
        weights = [parameters[name] for name in names]
        slopes = [gradients[name] for name in names]
        first = [self.first_moments[name] for name in names]
        second = list(self.second_moments.values())
        # A call for all parameters at once, where a GPU would wait for hundreds of small ones.
        torch._foreach_lerp_(first, slopes, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, slopes, slopes, value=1 - beta2)
        spread = torch._foreach_div(second, second_correction)
        torch._foreach_sqrt_(spread)
        torch._foreach_add_(spread, eps)
        torch._foreach_addcdiv_(weights, first, spread, value=-lr / first_correction)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return the nearest orthogonal matrices, roughly, of a stack (n, rows, columns).

    It is Newton-Schulz with Muon's quintic coefficients. Singular values end between 0.7 and 1.2.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    # Not in bfloat16: most CPUs multiply that ten times slower.
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if is_tall else x
