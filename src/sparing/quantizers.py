"""Quantisers: from numbers to few levels and back, gradients through them, and packed codes.

A codebook is an ascending tensor of levels, made for a standard normal variable. A
`NormalQuantizer` standardises a weight matrix, takes the nearest level of every entry and scales it
back. `pack_bits` stores the codes in as many bits as they need.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sparing.errors import ConfigError, DataError

Codebook = Literal["k-median", "lloyd-max", "uniform", "sign"]
Granularity = Literal["matrix", "row"]
CODEBOOKS: tuple[str, ...] = get_args(Codebook)
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
SMALLEST_SCALE = 1e-8  # a matrix that varies less has no codes


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes as a stream of bits: first code first, its lowest bit first, low bits of a byte first.

    Arguments:
        codes: any shape and integer type, each 0 to 2**bits - 1; read row by row.
        bits: of one code, 1 to 8.

    Returns:
        (⌈codes · bits / 8⌉,) uint8; what the last byte has to spare is 0.
    """
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.to(torch.uint8).reshape(-1, 1) >> places) & 1).flatten()
    spare = -stream.numel() % 8
    octets = torch.nn.functional.pad(stream, (0, spare)).view(-1, 8)
    values = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (octets << values).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes that `pack_bits` packed.

    Arguments:
        packed: (⌈count · bits / 8⌉,) uint8.
        bits: of one code, 1 to 8.
        count: of codes.

    Returns:
        (count,) uint8.

    Raises:
        DataError: there are more or fewer bytes than these codes take.
    """
    if packed.numel() != packed_bytes(count, bits):
        raise DataError(
            f"{count:,} codes of {bits} bits",
            expected=f"{packed_bytes(count, bits):,} bytes",
            found=f"{packed.numel():,} bytes",
            mend="Give the number of bits and of codes that were packed.",
        )
    values = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, None] >> values) & 1).flatten()[: count * bits].view(count, bits)
    return (stream << values[:bits]).sum(dim=1, dtype=torch.uint8)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take: ⌈count · bits / 8⌉."""
    return -(-count * bits // 8)


@lru_cache(maxsize=32)
def codebook(kind: Codebook, bits: int) -> Tensor:
    """Levels for a standard normal variable.

    - "k-median": every level is the median of its cell, which minimises E|x - Q(x)|; the fixed
      point of v_i = Φ⁻¹((Φ(t_{i-1}) + Φ(t_i)) / 2), t_i = (v_i + v_{i+1}) / 2 (Bi-Adapter, eqs. 1
      and 2; the paper stops after 500 iterations, we go on to the fixed point).
    - "lloyd-max": every level is the mean of its cell, which minimises E(x - Q(x))².
    - "uniform": evenly spaced, with the step that minimises E(x - Q(x))² (Max 1960).
    - "sign": -1 and 1; one bit only.

    Arguments:
        kind: which of these.
        bits: 1 to 8.

    Returns:
        (2**bits,) float64, ascending, symmetric about 0. Shared: do not change it.

    Raises:
        ConfigError: no such codebook, or not with that many bits.
    """
    most = 1 if kind == "sign" else 8
    if kind not in CODEBOOKS or not 1 <= bits <= most:
        raise ConfigError(
            "codebook",
            expected=f"one of {', '.join(CODEBOOKS)} with 1 to 8 bits ('sign': 1)",
            found=f"{kind!r} with {bits} bits",
            mend="Try 'k-median'.",
        )
    if kind == "sign":
        return torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu")
    if kind == "uniform":
        return _uniform(2**bits)
    # Companding: the best levels for a density f lie at quantiles of f^(1/2) and of f^(1/3).
    spread, centres = (2.0, _medians) if kind == "k-median" else (3.0, _means)
    middles = (_count_to(2**bits) + 0.5) / 2**bits
    return _fixed_point(centres, math.sqrt(spread) * torch.special.ndtri(middles))


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level of every entry; half-way between two, that of the lower one.

    Arguments:
        x: any shape, floating.
        levels: (levels,) ascending, of the type and on the device of x.

    Returns:
        like x, int32.
    """
    return torch.bucketize(x.contiguous(), _thresholds(levels), out_int32=True)


class Encoded(NamedTuple):
    """A quantised matrix.

    Arguments:
        codes: (rows, columns) int32 or uint8, indices of levels.
        centre: (1, 1) or (rows, 1), what is added: μ.
        scale: of that shape, what levels are multiplied with: σ.
    """

    codes: Tensor
    centre: Tensor
    scale: Tensor


@dataclass(frozen=True)
class NormalQuantizer:
    """Quantises a matrix after bringing it to mean 0 and standard deviation 1.

    Everything is computed in float32, or in float64 for such matrices.

    Arguments:
        bits: of a code, 1 to 8.
        codebook: see `codebook`. With "sign", matrices are divided by their mean absolute value
            and not centred, as in networks of binary weights.
        granularity: μ and σ of the whole "matrix" or of every "row".
        epsilon: added to σ where the matrix is divided by it, not where it is multiplied.

    Attributes:
        levels: (2**bits,) float64, ascending.
    """

    bits: int
    codebook: Codebook = "k-median"
    granularity: Granularity = "matrix"
    epsilon: float = 1e-5
    levels: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", codebook(self.codebook, self.bits))
        object.__setattr__(self, "_tables", {})

    def moments(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """μ and the unbiased σ of a matrix, over all entries or each row (Bi-Adapter, eq. 3).

        Arguments:
            w: (rows, columns).

        Returns:
            two tensors (1, 1) or (rows, 1); (0, mean |w|) for the codebook "sign".
        """
        exact = _exact(w)
        over = (0, 1) if self.granularity == "matrix" else (1,)
        if self.codebook == "sign":
            scale = exact.abs().mean(dim=over, keepdim=True)
            return torch.zeros_like(scale), scale
        std, mean = torch.std_mean(exact, dim=over, keepdim=True)
        return mean, std

    def encode(self, w: Tensor) -> Encoded:
        """The code of every entry, with μ and σ (Bi-Adapter, eqs. 3 and 4).

        Arguments:
            w: (rows, columns), floating.
        """
        return self._encode(w)[0]

    def decode(self, encoded: Encoded) -> Tensor:
        """Q·σ + μ: (rows, columns), of the type of the scale (Bi-Adapter, eq. 4)."""
        return self._levels_of(encoded) * encoded.scale + encoded.centre

    def prepare(self, w: Tensor, encoded: Encoded | None = None) -> "Prepared":
        """All that `straight_through` needs, to be used until w changes.

        Arguments:
            w: (rows, columns) latent weights.
            encoded: their codes, μ and σ, if they are known.
        """
        w = w.detach()
        if encoded is None:
            encoded, normal = self._encode(w)
        else:
            normal = self._standardized(w, encoded.centre, encoded.scale)
        levels = self._levels_of(encoded)
        value = levels * encoded.scale + encoded.centre
        return Prepared(self, value, levels, normal, encoded.scale)

    def _encode(self, w: Tensor) -> tuple[Encoded, Tensor]:
        mean, std = self.moments(w)
        normal = self._standardized(w, mean, std)
        thresholds = self._on(normal)[1]
        codes = torch.bucketize(normal.contiguous(), thresholds, out_int32=True)
        return Encoded(codes, mean, std), normal

    def _standardized(self, w: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (_exact(w) - mean) / (std + self.epsilon)

    def _levels_of(self, encoded: Encoded) -> Tensor:
        levels = self._on(encoded.scale)[0]
        return levels.index_select(0, encoded.codes.flatten().int()).view(encoded.codes.shape)

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Levels and thresholds of a type and on a device, made once."""
        tables: dict[Any, tuple[Tensor, Tensor]] = self.__dict__["_tables"]
        place = (like.device, like.dtype)
        if place not in tables:
            levels = self.levels.to(*place)
            tables[place] = levels, _thresholds(levels)
        return tables[place]


@dataclass(frozen=True)
class Prepared:
    """A quantised matrix on its way through a network that is being trained.

    Arguments:
        quantizer: that made it.
        value: (rows, columns) Q·σ + μ.
        levels: (rows, columns) Q.
        normal: (rows, columns) the standardised latent weights ŵ.
        scale: (1, 1) or (rows, 1) σ.
    """

    quantizer: NormalQuantizer
    value: Tensor
    levels: Tensor
    normal: Tensor
    scale: Tensor

    def gradient(self, g: Tensor) -> Tensor:
        """The gradient of the latent weights, given that of the quantised ones.

        That of w̃ = σ · (sg(Q - ŵ) + ŵ) + μ, where sg stops gradients and they flow through ŵ, σ and
        μ (Bi-Adapter, eq. 5). With ε = 0 it is G + ⟨Q - ŵ, G⟩ ŵ / (n - 1) (eq. 5b).

        Arguments:
            g: (rows, columns) G.
        """
        over = (0, 1) if self.quantizer.granularity == "matrix" else (1,)
        count = self.normal.numel() // self.scale.numel()
        shrink = self.scale / (self.scale + self.quantizer.epsilon)
        of_scale = ((self.levels - shrink * self.normal) * g).sum(dim=over, keepdim=True)
        if self.quantizer.codebook == "sign":
            return shrink * g + of_scale * self.normal.sign() / count
        of_mean = (1 - shrink) * g.mean(dim=over, keepdim=True)
        return shrink * g + of_mean + of_scale / (shrink * (count - 1)) * self.normal


def straight_through(w: Tensor, prepared: Prepared) -> Tensor:
    """The quantised weights, with the gradient of `Prepared.gradient` to the latent ones.

    Arguments:
        w: (rows, columns) latent weights.
        prepared: from them.

    Returns:
        (rows, columns): exactly what `decode` gives, so that training and loading agree bit by bit.
    """
    return _StraightThrough.apply(w, prepared)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, prepared: Prepared) -> Tensor:
        ctx.prepared, ctx.dtype = prepared, w.dtype
        return prepared.value.view_as(prepared.value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.prepared.gradient(g).to(ctx.dtype), None


def _exact(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _count_to(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device="cpu")  # also while models are on meta


def _thresholds(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


def _cells(v: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper threshold of every level's cell."""
    t = _thresholds(v)
    end = torch.full_like(v[:1], torch.inf)
    return torch.cat([-end, t]), torch.cat([t, end])


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _medians(v: Tensor) -> tuple[Tensor, Tensor]:
    """The medians of the levels' cells, and their derivatives to the cells' two thresholds."""
    lower, upper = _cells(v)
    medians = torch.special.ndtri((torch.special.ndtr(lower) + torch.special.ndtr(upper)) / 2)
    sides = torch.stack([_density(lower), _density(upper)])
    return medians, sides / (2 * _density(medians))


def _means(v: Tensor) -> tuple[Tensor, Tensor]:
    """The means of the levels' cells, and their derivatives to the cells' two thresholds."""
    lower, upper = _cells(v)
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    below, above = _density(lower), _density(upper)
    means = (below - above) / mass
    reach = torch.stack([means - lower, upper - means]).nan_to_num(posinf=0)
    return means, reach * torch.stack([below, above]) / mass


def _fixed_point(centres: Callable[[Tensor], tuple[Tensor, Tensor]], v: Tensor) -> Tensor:
    """Newton's method for levels that are the centres of their cells; steps are halved until the
    levels stay in order and come nearer."""
    middle, sides = centres(v)
    while (distance := (v - middle).norm()) > 1e-13:
        jacobian = torch.diag(1 - sides.sum(dim=0) / 2)
        jacobian -= torch.diag(sides[0, 1:] / 2, -1) + torch.diag(sides[1, :-1] / 2, 1)
        step = torch.linalg.solve(jacobian, v - middle)
        for _ in range(30):
            lower = (v - step)[: len(v) // 2]
            moved = torch.cat([lower, -lower.flip(0)])  # symmetric to the last bit
            middle, sides = centres(moved)
            if (moved.diff() > 0).all() and (moved - middle).norm() < distance:
                break
            step = step / 2
        else:
            break  # as near as float64 comes
        v = moved
    return v


def _uniform(count: int) -> Tensor:
    """The evenly spaced levels of least mean squared error on a normal variable."""
    units = _count_to(count) - (count - 1) / 2

    def slope(step: float) -> float:
        lower, upper = _cells(units * step)
        mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
        gain = _density(lower) - _density(upper)
        return float((units * (units * step * mass - gain)).sum())

    low, high = 1e-4, 4.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return units * (low + high) / 2
