"""What the layers of a network are told for one forward."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from sparing.errors import DataError


class Setting:
    """Held by every response layer and regulariser of one network.

    Attributes:
        rows: (rows or 1, h) inputs of the response, or None for none.
        tangent: a scalar that the response is multiplied by, or None for 1.
        values: of the hyperparameters, for regularisers; None outside of a forward.
        penalties: scalars that regularisers add to the training loss.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.tangent: Tensor | None = None
        self.values: Mapping[str, Tensor] | None = None
        self.penalties: list[Tensor] = []

    @contextmanager
    def during(
        self,
        rows: Tensor | None,
        values: Mapping[str, Tensor] | None,
        tangent: Tensor | None = None,
    ) -> Iterator[None]:
        """Hold for one forward and its backward."""
        before = self.rows, self.values, self.tangent, self.penalties
        self.rows, self.values, self.tangent, self.penalties = rows, values, tangent, []
        try:
            yield
        finally:
            self.rows, self.values, self.tangent, self.penalties = before

    def check_rows(self, found: int, rows: int) -> None:
        """Whether a tensor whose first axis is `found` long can be matched to the rows.

        Raises:
            DataError: it cannot.
        """
        if found not in (1, rows):
            raise DataError(
                "input of a layer",
                expected=f"one row for each of the {rows} rows of the batch, on the first axis",
                found=f"{found} rows",
                mend="Keep the batch on the first axis, or leave the layer out of `layers`.",
            )
