"""SVDiff: fine-tune the singular values of every weight (Han et al. 2023)."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparing.errors import ConfigError


class SpectralShift(nn.Module):
    """A parametrisation W' = U diag(ReLU(Σ + s δ)) Vᵀ of one weight W = U Σ Vᵀ.

    Computed as W + U diag(ReLU(Σ + s δ) - Σ) Vᵀ, which is the same and leaves W exactly as it is
    where δ = 0. The decomposition is made once, in float32, whatever the type of W; the result has
    the type of W. Neither the signs of singular vectors nor their order matter to W'.

    Arguments:
        weight: (outputs, ...), seen as the matrix (outputs, inputs · kernel). A vector is a matrix
            of one row [rec], so that its δ is a single number that scales it.
        scale: s.

    Attributes:
        delta: δ, (min(outputs, inputs · kernel),) float32, zero at the start; all that is trained.
        is_vector: whether the weight is one-dimensional, as in norms.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def __init__(self, weight: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        matrix = _as_matrix(weight.detach()).float()
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.delta = nn.Parameter(torch.zeros_like(values))
        self.scale = scale
        self.is_vector = weight.dim() == 1
        self._kept: tuple[tuple[int, int], Tensor | None] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """W', of the shape and type of `weight`."""
        if self.delta.requires_grad and torch.is_grad_enabled():
            self._kept = None
            return self._shifted(weight)
        # A frozen δ is applied once. In most trials it is zero, and then nothing is kept at all.
        state = (self.delta._version, weight._version)
        if self._kept is None or self._kept[0] != state:
            with torch.no_grad():
                moved = bool(self.delta.any())
                self._kept = (state, self._shifted(weight) if moved else None)
        kept = self._kept[1]
        return weight if kept is None else kept

    def _shifted(self, weight: Tensor) -> Tensor:
        change = torch.relu(self.values + self.scale * self.delta.float()) - self.values
        update = (self.left * change) @ self.right
        return (weight.float() + update.view(weight.shape)).to(weight.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Factors stay float32 when the model is cast, since a 16-bit basis is not orthogonal.
        self._kept = None
        names = ("left", "values", "right", "delta")
        exact = {name: getattr(self, name).data for name in names}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                after.data = before.to(after.device)
        return self


def install(model: nn.Module, scale: float = 1.0) -> list[str]:
    """Put a `SpectralShift` on every weight of a model, and freeze the rest.

    Every module with a floating-point `weight` counts: linear layers, convolutions, embeddings and
    norms. Biases stay as they are. Weights that have a shift already keep it.

    Returns:
        names of the shifts' parameters.

    Raises:
        ConfigError: a weight is not finite or not of a floating-point type, or there is none.
    """
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or isinstance(module, parametrize.ParametrizationList):
            continue
        if not weight.is_floating_point() or not torch.isfinite(weight).all():
            raise ConfigError(
                f"{name}.weight",
                expected="finite floating-point numbers",
                found=f"{weight.dtype} weights, or NaN or infinity among them",
                mend="SVDiff needs the singular values of every weight: load it unquantised.",
            )
        parametrize.register_parametrization(module, "weight", SpectralShift(weight, scale))
    model.requires_grad_(False)
    found = [f"{name}.delta" for name, _ in shifts(model)]
    if not found:
        raise ConfigError(
            type(model).__name__,
            expected="modules with a weight",
            found="none",
            mend="Choose another family of parameters.",
        )
    for name in found:
        model.get_parameter(name).requires_grad_(True)
    return found


def shifts(model: nn.Module) -> list[tuple[str, SpectralShift]]:
    """All shifts of a model with their names."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, SpectralShift)]


def export(model: nn.Module) -> nn.Module:
    """Fold every shift into its weight, in place, exactly; returns the model, now a plain one."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module, "weight"):
            continue
        lists = module.parametrizations["weight"]  # type: ignore[index]
        if any(isinstance(part, SpectralShift) for part in lists):
            with torch.no_grad():
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            # The weight is now the last parameter, and an optimiser knows parameters by position.
            names = sorted(module._parameters, key=lambda name: name != "weight")
            module._parameters = {name: module._parameters[name] for name in names}
    return model


def _as_matrix(weight: Tensor) -> Tensor:
    return weight[None] if weight.dim() == 1 else weight.flatten(1)
