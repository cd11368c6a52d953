"""Which task every row of a batch belongs to."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparing.errors import ConfigError, DataError, near_matches

Task = str | int


def task_numbers(tasks: Any, names: Sequence[str]) -> list[int]:
    """Numbers of tasks given by name or number: one, or one for each row.

    Arguments:
        tasks: a name, a number, a sequence of these, or an integer tensor () or (rows,).
        names: of all tasks.

    Raises:
        ConfigError: there is no such task.
        DataError: a tensor that is no list of whole numbers.
    """
    if isinstance(tasks, Tensor):
        whole = not tasks.is_floating_point() and not tasks.is_complex()
        if tasks.dim() > 1 or not whole or tasks.dtype == torch.bool:
            raise DataError(
                "tasks",
                expected="an integer tensor with one task for each row, (rows,)",
                found=f"{tasks.dtype} of shape {tuple(tasks.shape)}",
                mend="Give the number of each row's task, from 0.",
            )
        tasks = tasks.reshape(-1).tolist()
    given = [tasks] if isinstance(tasks, str | int) else list(tasks)
    if not given:
        raise DataError(
            "tasks", expected="at least one task", found="none", mend="Name the task of each row."
        )
    return [_number(task, names) for task in given]


def _number(task: Task, names: Sequence[str]) -> int:
    if isinstance(task, str):
        if task in names:
            return names.index(task)
    elif isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(names):
        return task
    raise ConfigError(
        "task",
        expected=f"a name among {', '.join(names)} or a number from 0 to {len(names) - 1}",
        found=repr(task),
        mend=near_matches(str(task), list(names)),
    )


class Groups(NamedTuple):
    """Rows sorted by task.

    Arguments:
        rows: by task, the rows that have it, (rows of the task,) int64.
        back: of the groups one after the other, which row each original row is, (rows,) int64.
    """

    rows: dict[int, Tensor]
    back: Tensor


class Assignment:
    """The tasks of the rows of a forward.

    Arguments:
        tasks: of each row, or a single one for all rows.

    Attributes:
        single: the task, if all rows have the same; else None.
    """

    def __init__(self, tasks: Sequence[int]) -> None:
        self.tasks = tuple(tasks)
        self.single = self.tasks[0] if len(set(self.tasks)) == 1 else None
        self._groups: dict[tuple[int, torch.device], Groups] = {}

    def of_rows(self, rows: int, module: str) -> list[int]:
        """The task of each row of a layer's input.

        Layers may see a multiple of the rows of the call, each one's side by side: beams, or tokens
        that were flattened into the batch.

        Raises:
            DataError: there are not as many tasks as rows.
        """
        if len(self.tasks) == 1:
            return [self.tasks[0]] * rows
        times, rest = divmod(rows, len(self.tasks))
        if rest or not times:
            raise DataError(
                f"tasks, at module {module!r}",
                expected=f"one task for each of the {rows} rows",
                found=f"{len(self.tasks)} tasks",
                mend="Give one task for each row of the batch, or one for all.",
            )
        return [task for task in self.tasks for _ in range(times)]

    def groups(self, rows: int, device: torch.device, module: str) -> Groups:
        """The rows of a layer's input by task; found once for all layers."""
        key = (rows, device)
        if key not in self._groups:
            tasks = self.of_rows(rows, module)
            by_task = {
                task: [row for row, own in enumerate(tasks) if own == task] for task in set(tasks)
            }
            order = [row for own in by_task.values() for row in own]
            places = {row: place for place, row in enumerate(order)}
            self._groups[key] = Groups(
                {task: torch.tensor(own, device=device) for task, own in by_task.items()},
                torch.tensor([places[row] for row in range(rows)], device=device),
            )
        return self._groups[key]
