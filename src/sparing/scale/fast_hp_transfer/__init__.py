"""Fast-HP-Transfer: how fast the best hyperparameters converge with width, and why.

Three parts: rates and a verdict from a table of runs (`analyze_transfer`); a recorder that splits
the fall of a run's loss into directions (`TrajectoryRecorder`) with the search for the few that
decide the optimum (`find_truncation`); and two testbeds, one where transfer is provably fast
(`RandomFeatures`) and one where it is slow or breaks (`TwoLayerTask`).

Understanding the Mechanisms of Fast Hyperparameter Transfer, arXiv 2512.22768. There is no released
code; what the paper leaves open is marked [rec].
"""

from sparing.scale.fast_hp_transfer.alignment import (
    alignment_matrix,
    leading,
    partial_sums,
    spectrum,
)
from sparing.scale.fast_hp_transfer.analysis import analyze_transfer
from sparing.scale.fast_hp_transfer.budget import TransferCost
from sparing.scale.fast_hp_transfer.ema import EmaSchedule
from sparing.scale.fast_hp_transfer.grid import run_grid
from sparing.scale.fast_hp_transfer.matrices import splits
from sparing.scale.fast_hp_transfer.random_features import RandomFeatures
from sparing.scale.fast_hp_transfer.recorder import TrajectoryRecorder
from sparing.scale.fast_hp_transfer.results import Estimate, TransferAnalysis, WidthResult
from sparing.scale.fast_hp_transfer.samples import easy_and_hard, mean_component_index
from sparing.scale.fast_hp_transfer.table import Columns, Sweep, read_sweep
from sparing.scale.fast_hp_transfer.trajectory import PhiCurves, Trajectory
from sparing.scale.fast_hp_transfer.truncation import (
    Truncation,
    find_truncation,
    tightest_bound,
    transfer_bound,
)
from sparing.scale.fast_hp_transfer.two_layer import TwoLayerReLU, TwoLayerTask

__all__ = [
    "Columns",
    "EmaSchedule",
    "Estimate",
    "PhiCurves",
    "RandomFeatures",
    "Sweep",
    "Trajectory",
    "TrajectoryRecorder",
    "TransferAnalysis",
    "TransferCost",
    "Truncation",
    "TwoLayerReLU",
    "TwoLayerTask",
    "WidthResult",
    "alignment_matrix",
    "analyze_transfer",
    "easy_and_hard",
    "find_truncation",
    "leading",
    "mean_component_index",
    "partial_sums",
    "read_sweep",
    "run_grid",
    "spectrum",
    "splits",
    "tightest_bound",
    "transfer_bound",
]
