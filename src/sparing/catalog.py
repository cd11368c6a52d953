"""The 45 methods: one row each, whether built or planned."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["planned", "ready"]


@dataclass(frozen=True)
class Method:
    """One published method.

    Arguments:
        slug: names its module, test, reproduction and docs page alike.
        title: of the paper, shortened.
        room: the package under `sparing` that holds it.
        status: "ready" once it can be used, "planned" before.
        arxiv: identifier of the paper.
    """

    slug: str
    title: str
    room: str
    status: Status
    arxiv: str

    @property
    def paper(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def module(self) -> str:
        """Import path of the method's file."""
        return f"sparing.{self.room}.{self.slug.replace('-', '_')}"


CATALOG: tuple[Method, ...] = (
    Method(
        "mos",
        "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
        "adapt",
        "ready",
        "2410.00938",
    ),
    Method(
        "neuroada",
        "NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient Fine-Tuning",
        "adapt",
        "ready",
        "2510.18940",
    ),
    Method(
        "sara",
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        "adapt",
        "ready",
        "2409.06633",
    ),
    Method(
        "hut",
        "HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation",
        "adapt",
        "ready",
        "2409.13501",
    ),
    Method(
        "ept",
        "EPT: Expert Pyramid Tuning: Efficient Parameter Fine-Tuning for Expertise-Driven Task Allocation",
        "adapt",
        "ready",
        "2603.12577",
    ),
    Method(
        "queryable-lora",
        "Queryable LoRA: Instruction-Regularized Routing Over Shared Low-Rank Update Atoms",
        "adapt",
        "ready",
        "2605.08423",
    ),
    Method(
        "dopamine",
        "TauGate (Dopamine): Brain Modes, Not Brains — Activation-Gated PEFT via Threshold-and-Gain Tuning",
        "adapt",
        "ready",
        "2602.11726",
    ),
    Method(
        "unified-peft",
        "Unified PEFT / MAM adapter: Towards a Unified View of Parameter-Efficient Transfer Learning",
        "adapt",
        "ready",
        "2110.04366",
    ),
    Method(
        "bi-adapter",
        "Bi-Adapter: Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
        "adapt",
        "ready",
        "2307.16867",
    ),
    Method(
        "phatgoose",
        "PHATGOOSE: Learning to Route Among Specialized Experts for Zero-Shot Generalization",
        "adapt",
        "ready",
        "2402.05859",
    ),
    Method(
        "pcb-merging",
        "PCB-Merging: Parameter Competition Balancing for Model Merging",
        "merge",
        "ready",
        "2410.02396",
    ),
    Method(
        "made-it",
        "MADE-IT: Towards Adaptive Continual Model Merging via Manifold-Aware Expert Evolution",
        "merge",
        "ready",
        "2604.22464",
    ),
    Method(
        "adaquant-ip",
        "AdaQuant + IP: Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
        "compress",
        "planned",
        "2006.10518",
    ),
    Method(
        "shiftaddllm",
        "ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization",
        "compress",
        "planned",
        "2406.05981",
    ),
    Method(
        "ramp",
        "RAMP: Reinforcement Adaptive Mixed Precision Quantization for Efficient On Device LLM Inference",
        "compress",
        "planned",
        "2603.17891",
    ),
    Method(
        "perp",
        "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        "compress",
        "planned",
        "2312.15230",
    ),
    Method(
        "stable-rps",
        "STABLE-RPS: In defense of parameter sharing for model-compression",
        "compress",
        "planned",
        "2310.11611",
    ),
    Method(
        "ftwt",
        "FTWT: Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction",
        "compress",
        "planned",
        "2110.08232",
    ),
    Method(
        "jei-dnn",
        "JEI-DNN: Jointly-Learned Exit and Inference for a Dynamic Neural Network",
        "compress",
        "ready",
        "2310.09163",
    ),
    Method(
        "liger",
        "Liger: Linearizing Large Language Models to Gated Recurrent Structures",
        "compress",
        "planned",
        "2503.01496",
    ),
    Method(
        "gated-attention",
        "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
        "layers",
        "planned",
        "2505.06708",
    ),
    Method(
        "versatileffn",
        "VersatileFFN: Achieving Parameter Efficiency in LLMs via Adaptive Wide-and-Deep Reuse",
        "layers",
        "planned",
        "2512.14531",
    ),
    Method(
        "move",
        "MoVE: Mixture of Value Embeddings — A New Axis for Scaling Parametric Memory in Autoregressive Models",
        "layers",
        "planned",
        "2601.22887",
    ),
    Method("widenet", "WideNet: Go Wider Instead of Deeper", "layers", "planned", "2107.11817"),
    Method(
        "s4d",
        "S4D: On the Parameterization and Initialization of Diagonal State Space Models",
        "layers",
        "planned",
        "2206.11893",
    ),
    Method(
        "parcae",
        "Parcae: Scaling Laws For Stable Looped Language Models",
        "models",
        "planned",
        "2604.12946",
    ),
    Method(
        "cart",
        "CART: Context-Anchored Recurrent Transformer — A Parameter-Efficient Architecture with Learned Stability",
        "models",
        "planned",
        "2606.01495",
    ),
    Method(
        "mor",
        "Mixture-of-Recursions (MoR): Learning Dynamic Recursive Depths for Adaptive Token-Level Computation",
        "models",
        "planned",
        "2507.10524",
    ),
    Method(
        "hyperp",
        "HyperP + MuonH + SqrtGate: Rethinking Language Model Scaling under Transferable Hypersphere Optimization",
        "scale",
        "ready",
        "2603.28743",
    ),
    Method(
        "muon-mup",
        "Muon++: Towards a Principled Muon under μP: Ensuring Spectral Conditions throughout Training",
        "scale",
        "ready",
        "2601.01306",
    ),
    Method(
        "wd-scaling",
        "√d weight-decay scaling for AdamW: Robust Layerwise Scaling Rules by Proper Weight Decay Tuning",
        "scale",
        "ready",
        "2510.15262",
    ),
    Method(
        "fast-hp-transfer",
        "Fast-HP-Transfer (transfer rates + top-κ trajectory decomposition): Understanding the Mechanisms of Fast Hyperparameter Transfer",
        "scale",
        "ready",
        "2512.22768",
    ),
    Method(
        "stn",
        "STN: Self-Tuning Networks — Bilevel Optimization of Hyperparameters using Structured Best-Response Functions",
        "tune",
        "ready",
        "1903.03088",
    ),
    Method(
        "memcontrol",
        "MemControl: Mitigating Memorization in Diffusion Models via Automated Parameter Selection",
        "tune",
        "ready",
        "2405.19458",
    ),
    Method(
        "ewa",
        "EWA: Experts Weights Averaging: A New General Training Scheme for Vision Transformers",
        "training",
        "planned",
        "2308.06093",
    ),
    Method(
        "dsp-reg",
        "DSP-Reg: Domain-Sensitive Parameter Regularization for Robust Domain Generalization",
        "training",
        "planned",
        "2601.19394",
    ),
    Method(
        "rdtf",
        "RDTF: Resource-efficient Dual-mask Training Framework for Multi-frame Animated Sticker Generation",
        "training",
        "planned",
        "2503.17735",
    ),
    Method(
        "linear-forecast",
        "SearchCast: How Good Can Linear Models Be for Time-Series Forecasting?",
        "forecast",
        "planned",
        "2606.27282",
    ),
    Method(
        "tpgn",
        "TPGN: PGN: The RNN's New Successor is Effective for Long-Range Time Series Forecasting",
        "forecast",
        "planned",
        "2409.17703",
    ),
    Method(
        "mixer-dsr",
        "MixER: Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via Mixture of Experts",
        "dynamics",
        "planned",
        "2502.05335",
    ),
    Method(
        "topk-gating-stats",
        "TopK-GMoE: Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts",
        "mixtures",
        "planned",
        "2309.13850",
    ),
    Method(
        "udm",
        "UDM-LOO: Uniform Diffusion Models Revisited: Leave-One-Out Denoiser and Absorbing State Reformulation",
        "diffusion",
        "planned",
        "2605.22765",
    ),
    Method(
        "ppo-1m-envs",
        "PPO-1M: Preventing Learning Stagnation in PPO by Scaling to 1 Million Parallel Environments",
        "rl",
        "planned",
        "2603.06009",
    ),
    Method(
        "trust-the-batch",
        "P3O (2026): Trust the Batch, On- or Off-Policy — Adaptive Policy Optimization for RL Post-Training",
        "rl",
        "planned",
        "2605.12380",
    ),
    Method(
        "switch-nerf-pp",
        "Switch-NeRF++: Learning Heterogeneous Mixture of Scene Experts for Large-scale Neural Radiance Fields",
        "scenes",
        "planned",
        "2505.02005",
    ),
)


def ready(room: str) -> tuple[Method, ...]:
    """The methods of a room that can be used today, in catalog order."""
    return tuple(method for method in CATALOG if method.room == room and method.status == "ready")
