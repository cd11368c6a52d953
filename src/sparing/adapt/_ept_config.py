"""Options of EPT."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sparing.adapt._ept_contrast import Pooling
from sparing.tuners import TunerConfig


@dataclass
class EPTConfig(TunerConfig):
    """Options of EPT.

    Trainable parameters of a layer: r (⌊inputs/s_min⌋ + ⌊outputs/s_min⌋) + Σ s_i², and its router:
    T·inputs + N (inputs + 1) for "task", T·N for "table", N·inputs for "token".

    Arguments:
        r: rank of the seed, >= 1.
        lora_alpha: above 0; the update is scaled by lora_alpha / r.
        lora_dropout: of the adapter's input, 0 <= dropout < 1. 0.1 in the paper; off here, as it is
            in PEFT's LoRA.
        kernel_sizes: s_i of each expert, 1 to the width of the layer.
        top_k: k, experts that a task uses, 1 <= k <= experts.
        num_tasks: T, >= 1.
        task_names: one for each task; None numbers them. Sets `num_tasks`.
        router: "task", embedding and gate (eq. 6); "table", a number for each task and expert,
            which is all that a router by task amounts to; "token", a softmax over the layer's
            input, which does not merge. None means "table" for one task, where nothing has to be
            told apart, and else "task".
        router_temperature: of the "token" router's softmax, above 0.
        projection: "kron", the paper's transposed convolution; "channel", that of the released
            code, which reads only the first inputs/s features.
        dim_scaling: "d_over_T" multiplies expert i by s_i / T (eq. 4), "none" does not, like the
            released code.
        lambda_con: of the contrastive loss (eq. 8), >= 0; acts in training with router "task" and
            at least two tasks.
        tau: temperature of the contrastive loss (eq. 7), above 0.
        contrastive_input: "first" token of the layer's input, as in the paper, or "mean" over
            tokens. None means "mean" for causal models, whose first tokens are all alike.
        seed_init: "gaussian", A with standard deviation 1/√r and B with 1; "kaiming", the released
            code's uniform; "lora", A uniform and B zero.
        seed_scale: multiplies the initial B, above 0. The paper's deviation is not known; at 1 the
            first steps on the kernels are huge, and the best learning rate ten times smaller.
        kernel_init: "zero", so that a new adapter changes nothing; "kaiming", the released code's
            default, which starts from a changed model.
        task_emb_std: standard deviation of new task embeddings, above 0; None for 1/√inputs. At
            0.01, the released code's, nearly all tasks start with the same experts.
    """

    method: ClassVar[str] = "ept"
    size_option: ClassVar[str] = "r"
    learning_rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)

    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    kernel_sizes: list[int] = field(default_factory=lambda: [2, 2, 4, 4, 6, 6, 8, 8])
    top_k: int = 2
    num_tasks: int = 1
    task_names: list[str] | None = None
    router: Literal["task", "table", "token"] | None = None
    router_temperature: float = 1.0
    projection: Literal["kron", "channel"] = "kron"
    dim_scaling: Literal["d_over_T", "none"] = "d_over_T"
    lambda_con: float = 0.1
    tau: float = 0.05
    contrastive_input: Pooling | None = None
    seed_init: Literal["gaussian", "kaiming", "lora"] = "gaussian"
    seed_scale: float = 0.1
    kernel_init: Literal["zero", "kaiming"] = "zero"
    task_emb_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kernel_sizes = list(self.kernel_sizes)
        if self.task_names is not None:
            self.task_names = list(self.task_names)
            if self.num_tasks == 1:
                self.num_tasks = len(self.task_names)
        for option in ("r", "num_tasks"):
            self.require(option, getattr(self, option) >= 1, "at least 1", "Try the default.")
        self.require(
            "kernel_sizes",
            bool(self.kernel_sizes) and min(self.kernel_sizes) >= 1,
            "at least one size, each at least 1",
            "Use [2, 2, 4, 4, 6, 6, 8, 8].",
        )
        self.require(
            "top_k",
            1 <= self.top_k <= self.num_experts,
            f"from 1 to {self.num_experts}, the number of experts",
            "Lower it, or add kernel sizes.",
        )
        self.require(
            "task_names",
            self.task_names is None or len(set(self.task_names)) == self.num_tasks,
            f"{self.num_tasks} different names, as num_tasks says",
            "Leave num_tasks out.",
        )
        for option, choices in _CHOICES.items():
            expected = " or ".join(map(repr, choices))
            mend = f"Use {choices[0]!r}."
            self.require(option, getattr(self, option) in choices, expected, mend)
        for option in ("lora_alpha", "router_temperature", "tau", "seed_scale"):
            self.require(option, getattr(self, option) > 0, "above 0", "Use the default.")
        self.require("lambda_con", self.lambda_con >= 0, "at least 0", "Use 0.1.")
        std = self.task_emb_std
        self.require("task_emb_std", std is None or std > 0, "None or above 0", "Use None.")
        dropout = 0 <= self.lora_dropout < 1
        self.require("lora_dropout", dropout, "from 0 to below 1", "Use 0 or 0.1.")
        self.require(
            "kernel_init",
            self.seed_init != "lora" or self.kernel_init != "zero",
            "'kaiming' beside seed_init='lora': with B and the kernels zero nothing ever learns",
            "Use seed_init='gaussian'.",
        )
        if self.router is None:
            self.router = "table" if self.num_tasks == 1 else "task"

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.kernel_sizes)

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return self.task_names or [str(number) for number in range(self.num_tasks)]

    @property
    def uses_embeddings(self) -> bool:
        """Whether the router embeds tasks."""
        return self.router == "task"

    @property
    def contrasts(self) -> bool:
        """Whether training has a contrastive loss."""
        return self.uses_embeddings and self.num_tasks > 1 and self.lambda_con > 0

    def coefficient(self, size: int) -> float:
        """(α/r)(d_i/T) of an expert (EPT, eq. 4); d_i = s_i is reconstructed."""
        scaling = self.lora_alpha / self.r
        return scaling * size / self.num_tasks if self.dim_scaling == "d_over_T" else scaling


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "router": (None, "task", "table", "token"),
    "projection": ("kron", "channel"),
    "dim_scaling": ("d_over_T", "none"),
    "contrastive_input": (None, "first", "mean"),
    "seed_init": ("gaussian", "kaiming", "lora"),
    "kernel_init": ("zero", "kaiming"),
}
