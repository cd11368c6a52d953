"""A testbed where transfer is provably fast: the best ridge of random-features regression.

Inputs x ~ N(0, I_d), labels y = σ*(⟨x, β⟩) + ε, features σ(W x) with W_ij ~ N(0, 1/d), all of them
divided by the square root of their number; ridge regression with the penalty λ‖a‖². Samples and
features grow with d: N/d → ψ1 and n/d → ψ2, so ψ2 is the width and λ the hyperparameter.

The paper prints the penalty on undivided features; its asymptotics are those of divided ones. Its
appendix drops a term of order ψ1/ψ2, so that its two constants are wrong; here they are corrected
(both found for our specification by derivation and simulation).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import erf, exp, isfinite, pi, sqrt, tanh
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparing.errors import ConfigError
from sparing.scale.fast_hp_transfer._scipy import scipy_part
from sparing.tuners import generator_for

Scalar = Callable[[float], float]

_SCALAR: dict[str, Scalar] = {
    "tanh": tanh,
    "relu": lambda z: max(z, 0.0),
    "erf": lambda z: erf(z / sqrt(2)),
    "linear": lambda z: z,
}
_TENSOR: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "erf": lambda z: torch.erf(z / sqrt(2)),
    "linear": lambda z: z,
}


class Activation(NamedTuple):
    """A function made centred and of unit variance under a standard normal argument.

    Arguments:
        name: of the function.
        mean: E σ(z), which is taken off.
        deviation: standard deviation of σ(z), which it is divided by.
        linear: the square of μ1 = E z σ(z) of the result; 1 less it is the non-linear part, μ2².
    """

    name: str
    mean: float
    deviation: float
    linear: float

    def __call__(self, z: Tensor) -> Tensor:
        return (_TENSOR[self.name](z) - self.mean) / self.deviation


def activation(name: str) -> Activation:
    """One of tanh, relu, erf and linear, normalised by quadrature.

    Raises:
        ConfigError: another name.
    """
    if name not in _SCALAR:
        raise ConfigError(
            "activation", expected=f"one of {', '.join(_SCALAR)}", found=repr(name),
            mend="Name one of these.",
        )  # fmt: skip
    quad = scipy_part("integrate").quad

    def expect(f: Scalar) -> float:
        value, _ = quad(
            lambda z: f(z) * exp(-z * z / 2) / sqrt(2 * pi), -12, 12, points=[0.0], epsabs=1e-13
        )
        return float(value)

    raw = _SCALAR[name]
    mean = expect(raw)
    deviation = sqrt(expect(lambda z: (raw(z) - mean) ** 2))
    slope = expect(lambda z: z * (raw(z) - mean)) / deviation
    return Activation(name, mean, deviation, slope**2)


class Fixed(NamedTuple):
    """The solution m1, m2 of equations (18) and (19), and its derivatives by λ."""

    m1: float
    m2: float
    slope1: float
    slope2: float


class Best(NamedTuple):
    """The best ridge at a width, and its test error."""

    ridge: float
    risk: float


@dataclass(frozen=True)
class RandomFeatures:
    """Random-features ridge regression in the limit of proportional growth.

    Arguments:
        psi1: samples over input dimensions, above 0.
        features: name of σ.
        target: name of σ*.
        noise: standard deviation of ε.

    Raises:
        ConfigError: an option out of range, or no positive ridge is best at infinite width.
    """

    psi1: float = 4.0
    features: str = "tanh"
    target: str = "relu"
    noise: float = 0.25
    _activations: tuple[Activation, Activation] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("psi1", 0.0), ("noise", -1e-300)):
            value = getattr(self, name)
            if not (isfinite(value) and value > least):
                raise ConfigError(
                    f"RandomFeatures.{name}", expected="a number above 0", found=repr(value),
                    mend="The paper has psi1=4 and noise=0.25.",
                )  # fmt: skip
        pair = activation(self.features), activation(self.target)
        object.__setattr__(self, "_activations", pair)
        if self.best_at_infinity().ridge <= 0:
            raise ConfigError(
                "RandomFeatures",
                expected="noise or a non-linear target, so that some ridge above 0 is best",
                found=f"target {self.target!r} with noise {self.noise:g}",
                mend="Raise the noise.",
            )

    @property
    def _linear(self) -> float:
        return self._activations[0].linear

    @property
    def _signal(self) -> float:
        return self._activations[1].linear

    @property
    def _unlearnable(self) -> float:
        """What acts as noise: the target's non-linear part, and the noise itself."""
        return 1 - self._signal + self.noise**2

    def solve(self, ridge: float, psi2: float = float("inf")) -> Fixed:
        """Equations (18) and (19), followed from infinite width, where they have a closed form.

        Arguments:
            ridge: λ above 0.
            psi2: width, above 0; features over input dimensions.
        """
        if not ridge > 0 or not psi2 > 0:
            raise ConfigError(
                "RandomFeatures.solve", expected="a ridge and a width above 0",
                found=f"{ridge!r} and {psi2!r}", mend="Both are ratios; give positive numbers.",
            )  # fmt: skip
        t = self._infinite(ridge)
        m1 = (t - 1) / (self._linear * self.psi1)
        m = np.array([m1, m1 / t])
        final = self.psi1 / psi2
        eta, step = 0.0, min(final, 0.25)
        while eta < final:
            reached = self._newton(m, ridge, min(final, eta + step))
            if reached is None:
                step /= 2
                continue
            m, eta, step = reached, min(final, eta + step), step * 2
        slopes = np.linalg.solve(
            self._jacobian(m, ridge, final), -self._linear * m[0] ** 2 * m[1] * np.array([1, final])
        )
        return Fixed(float(m[0]), float(m[1]), float(slopes[0]), float(slopes[1]))

    def risk(self, ridge: float, psi2: float = float("inf")) -> float:
        """Squared test error, with the noise of the test labels (eq. 20)."""
        if psi2 == float("inf"):
            t, psi1 = self._infinite(ridge), self.psi1
            return psi1 * (self._unlearnable * t**2 + self._signal) / (psi1 * t**2 - (t - 1) ** 2)
        m = self.solve(ridge, psi2)
        return -(self._unlearnable * m.slope1 + self._signal * m.slope2) / m.m1**2

    def best(self, psi2: float) -> Best:
        """The ridge of least test error at a width, by Brent's method."""
        minimize = scipy_part("optimize").minimize_scalar
        centre = np.log(self.best_at_infinity().ridge)
        found = minimize(
            lambda logarithm: self.risk(float(np.exp(logarithm)), psi2),
            bracket=(centre - 0.5, centre + 0.5),
            options={"xtol": 1e-10},
        )
        return Best(float(np.exp(found.x)), float(found.fun))

    def best_at_infinity(self) -> Best:
        """λ*(∞) and its test error, in closed form (eq. 21)."""
        ridge = self._linear * self._unlearnable / self._signal - (1 - self._linear)
        return Best(ridge, self.risk(ridge) if ridge > 0 else float("nan"))

    def constants(self) -> tuple[float, float]:
        """Limits of ψ2 a_n / ψ1 and of ψ2 (λ*(ψ2) − λ*(∞)) / ψ1, with the omitted term restored."""
        ridge = self.best_at_infinity().ridge
        h = 1e-3 * ridge
        bend = (self.risk(ridge + h) - 2 * self.risk(ridge) + self.risk(ridge - h)) / h**2
        rise = self._first_order_risk(ridge + h) - self._first_order_risk(ridge - h)
        return self._first_order_risk(ridge), -rise / (2 * h) / bend

    def _first_order_risk(self, ridge: float) -> float:
        """∂R/∂η at infinite width, η = ψ1/ψ2."""
        m, h = self.solve(ridge), 1e-4 * ridge
        now = self._first_order(ridge)
        slopes = (self._first_order(ridge + h) - self._first_order(ridge - h)) / (2 * h)
        weights = np.array([self._unlearnable, self._signal])
        return float(
            -(weights @ slopes) / m.m1**2
            + 2 * (weights @ np.array([m.slope1, m.slope2])) * now[0] / m.m1**3
        )

    def _first_order(self, ridge: float) -> np.ndarray:
        """∂(m1, m2)/∂η at η = 0: the corrected response of our specification."""
        m1, m2, *_ = self.solve(ridge)
        mu1, mu2, psi1 = self._linear, 1 - self._linear, self.psi1
        j0 = [[ridge + mu2, mu1], [mu1 * m2 - 1 / psi1, mu1 * m1 + 1 / psi1]]
        both = mu2 * m1 + mu1 * m2
        return np.linalg.solve(j0, [both**2, mu1 * m1 * m2 * both])

    def _infinite(self, ridge: float) -> float:
        """t = 1 + μ1² ψ1 m1 at infinite width, where λ(t) falls from infinity as t grows."""
        mu1, mu2 = self._linear, 1 - self._linear

        def excess(u: float) -> float:
            return mu1 * self.psi1 / u - mu1 / (1 + u) - mu2 - ridge

        high = 1.0
        while excess(high) > 0:
            high *= 2
        low = high / 2
        while excess(low) < 0:
            low /= 2
        return 1 + float(scipy_part("optimize").brentq(excess, low, high, xtol=1e-15))

    def _residual(self, m: np.ndarray, ridge: float, eta: float) -> np.ndarray:
        m1, m2 = m
        mu1, mu2, psi1 = self._linear, 1 - self._linear, self.psi1
        last = mu1 * m1 * m2 * (ridge * m1 - 1)
        first = (m1 - m2) * (mu2 * m1 + mu1 * m2) / psi1 + last
        return np.array([first, mu1 * m1 * m2 + (m2 - m1) / psi1 + eta * last])

    def _jacobian(self, m: np.ndarray, ridge: float, eta: float) -> np.ndarray:
        m1, m2 = m
        mu1, mu2, psi1 = self._linear, 1 - self._linear, self.psi1
        both = mu2 * m1 + mu1 * m2
        last = np.array([mu1 * m2 * (2 * ridge * m1 - 1), mu1 * m1 * (ridge * m1 - 1)])
        first = np.array([both + mu2 * (m1 - m2), -both + mu1 * (m1 - m2)]) / psi1 + last
        second = np.array([mu1 * m2 - 1 / psi1, mu1 * m1 + 1 / psi1]) + eta * last
        return np.array([first, second])

    def _newton(self, start: np.ndarray, ridge: float, eta: float) -> np.ndarray | None:
        m = start.copy()
        for _ in range(30):
            step = np.linalg.solve(self._jacobian(m, ridge, eta), self._residual(m, ridge, eta))
            m = m - step
            if not (m > 0).all():
                return None
            if np.abs(step / m).max() < 1e-14:
                return m
        return m if np.abs(step / m).max() < 1e-11 else None

    def simulate(
        self, ridge: float, psi2: float, *, dimensions: int, tests: int = 4000, seed: int = 0
    ) -> float:
        """Test error of one real regression, float64.

        Arguments:
            ridge: λ, the penalty on the weights of features that are divided by √n.
            psi2: features over input dimensions.
            dimensions: d.
            tests: number of test points.
            seed: of data, features and noise.
        """
        generator = generator_for(seed, f"random features {self.features} {self.target}")

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        d, width = dimensions, round(psi2 * dimensions)
        teacher = normal(d)
        teacher /= teacher.norm()
        weights = normal(width, d) / sqrt(d)
        student, truth = self._activations

        def draw(rows: int) -> tuple[Tensor, Tensor]:
            x = normal(rows, d)
            labels = truth(x @ teacher) + self.noise * normal(rows)
            return student(x @ weights.T) / sqrt(width), labels

        z, y = draw(round(self.psi1 * d))
        if len(z) < width:
            kernel = z @ z.T + ridge * torch.eye(len(z), dtype=z.dtype)
            a = z.T @ torch.linalg.solve(kernel, y)
        else:
            a = torch.linalg.solve(z.T @ z + ridge * torch.eye(width, dtype=z.dtype), z.T @ y)
        z, y = draw(tests)
        return float((z @ a - y).square().mean())
