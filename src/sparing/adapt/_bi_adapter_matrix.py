"""A matrix of few levels: trained as real numbers, used and stored as codes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparing.errors import CheckpointError, DataError
from sparing.kept import Kept
from sparing.quantizers import (
    SMALLEST_SCALE,
    Encoded,
    NormalQuantizer,
    Prepared,
    pack_bits,
    packed_bytes,
    straight_through,
    unpack_bits,
)


class Packed(NamedTuple):
    """What a file holds of one matrix.

    Arguments:
        codes: (⌈rows · columns · bits / 8⌉,) uint8.
        moments: (1 or rows, 2) float32, μ and σ.
    """

    codes: Tensor
    moments: Tensor


class QuantizedMatrix(nn.Module):
    """Trains latent numbers, of which only the quantised ones are ever multiplied with anything.

    Outside of training, and between optimiser steps, the quantised matrix is kept. With several
    processes it is made anew in every forward, since sharding (FSDP) rewrites weights without a
    trace. Writing through `latent.data` leaves none either; call `train` or `eval` afterwards.

    A matrix that was loaded is exactly that of the file, for quantising its values again would not
    give them back. Training goes on from latent numbers that are quantised to the same codes, μ and
    σ (Reconstructed: the paper's code trains a loaded adapter without quantising it).

    Arguments:
        start: (rows, columns) float32, where the latent numbers start.
        quantizer: None leaves the matrix as it is (32 bits).

    Attributes:
        latent: (rows, columns) float32, trained.
        stored_codes, stored_moments: of the file it was loaded from, until training leaves them.
    """

    stored_codes: Tensor | None
    stored_moments: Tensor | None

    def __init__(self, start: Tensor, quantizer: NormalQuantizer | None) -> None:
        super().__init__()
        self.latent = nn.Parameter(start)
        self.quantizer = quantizer
        self.register_buffer("stored_codes", None, persistent=False)
        self.register_buffer("stored_moments", None, persistent=False)
        self._kept: Kept[Any] = Kept()

    @property
    def bits(self) -> int:
        """Of one number in a file."""
        return 32 if self.quantizer is None else self.quantizer.bits

    def weight(self) -> Tensor:
        """The quantised matrix (rows, columns), with gradients for the latent one."""
        if self.quantizer is None:
            return self.latent
        learns = torch.is_grad_enabled() and self.latent.requires_grad
        make: Callable[[], Any] = self._prepared if learns else self._value
        with torch.no_grad():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                made = make()
            else:
                made = self._kept.get((self.latent,), make, learns)
        return straight_through(self.latent, made) if learns else made

    def pack(self, latent: Tensor) -> Packed:
        """Codes, μ and σ for a file.

        Arguments:
            latent: the numbers to be stored; those of this matrix, gathered if it is sharded.

        Raises:
            DataError: all numbers are equal, so that they have no codes.
        """
        assert self.quantizer is not None
        if self._is_stored(latent):
            assert self.stored_codes is not None
            assert self.stored_moments is not None
            return Packed(self.stored_codes, self.stored_moments)
        encoded = self.quantizer.encode(latent)
        if not encoded.scale.is_meta and not encoded.scale.min() >= SMALLEST_SCALE:
            raise DataError(
                "quantised matrix",
                expected=f"numbers that differ: a standard deviation from {SMALLEST_SCALE}",
                found=f"a constant matrix, or NaN: deviation {float(encoded.scale.min()):.3g}",
                mend="Lower the weight decay or the learning rate, and train again.",
            )
        moments = torch.cat([encoded.centre, encoded.scale], dim=1)
        return Packed(pack_bits(encoded.codes, self.bits), moments.float())

    def unpack(self, packed: Packed, name: str) -> Tensor:
        """Become the matrix of a file.

        Arguments:
            packed: what it holds.
            name: of the matrix, for errors.

        Returns:
            the latent numbers (rows, columns) float32, still to be loaded.

        Raises:
            CheckpointError: the file's matrix has another size, or is damaged.
        """
        shape, groups = tuple(self.latent.shape), self._groups()
        expected = packed_bytes(self.latent.numel(), self.bits) if self.quantizer else 0
        found = packed.codes.numel()
        if found != expected or tuple(packed.moments.shape) != (groups, 2):
            raise CheckpointError(
                f"matrix {name!r} {shape} of {self.bits} bits",
                expected=f"{expected:,} bytes of codes, and {groups} × 2 moments",
                found=f"{found:,} bytes, and moments {tuple(packed.moments.shape)}",
                mend="The adapter belongs to another base model or other options; load it there.",
            )
        if not (packed.moments.isfinite().all() and (packed.moments[:, 1] >= SMALLEST_SCALE).all()):
            raise CheckpointError(
                f"matrix {name!r}",
                expected=f"a finite mean and a deviation from {SMALLEST_SCALE}",
                found="a constant matrix, NaN or infinity",
                mend="The file is damaged; fetch or save it again.",
            )
        device = packed.codes.device if self.latent.is_meta else self.latent.device
        self.stored_codes = packed.codes.to(device)
        self.stored_moments = packed.moments.to(device, torch.float32)
        self._kept.forget()
        return self._restored()

    def train(self, mode: bool = True) -> "QuantizedMatrix":
        """Switch between training and evaluation; see the class for what this forgets."""
        self._kept.forget()
        return super().train(mode)

    def _value(self) -> Tensor:
        assert self.quantizer is not None
        stored = self._from_file()
        encoded = self.quantizer.encode(self.latent) if stored is None else stored
        return self.quantizer.decode(encoded)

    def _prepared(self) -> Prepared:
        assert self.quantizer is not None
        return self.quantizer.prepare(self.latent, self._from_file())

    def _from_file(self) -> Encoded | None:
        """The file's codes, μ and σ, unless training has left them behind."""
        if self._is_stored(self.latent):
            return self._decoded_file()
        if self.stored_codes is not None and not torch.compiler.is_compiling():
            self.stored_codes = self.stored_moments = None
        return None

    def _is_stored(self, latent: Tensor) -> bool:
        """Whether the latent numbers are still those that the file gave."""
        if self.stored_codes is None:
            return False
        if torch.compiler.is_compiling():  # looking at numbers would break the graph
            return not latent.requires_grad
        return torch.equal(latent, self._restored().to(latent.device, latent.dtype))

    def _decoded_file(self) -> Encoded:
        assert self.stored_codes is not None
        assert self.stored_moments is not None
        codes = unpack_bits(self.stored_codes, self.bits, self.latent.numel())
        centre, scale = self.stored_moments.split(1, dim=1)
        return Encoded(codes.view(self.latent.shape), centre, scale)

    def _restored(self) -> Tensor:
        """Latent numbers with the file's codes, μ and σ: its levels, moved and spread.

        The levels of a file vary less than the numbers they stand for (by 0.67 with one bit), so
        that quantising them again would shrink the matrix.
        """
        assert self.quantizer is not None
        codes, centre, scale = self._decoded_file()
        levels = self.quantizer.decode(
            Encoded(codes, torch.zeros_like(centre), torch.ones_like(scale))
        )
        mean, std = self.quantizer.moments(levels)
        return (levels - mean) / std.clamp_min(SMALLEST_SCALE) * scale + centre

    def _groups(self) -> int:
        rows = self.quantizer is not None and self.quantizer.granularity == "row"
        return self.latent.shape[0] if rows else 1
