"""Small networks of the tests of this room."""

import torch
from torch import nn


def small_unet(seed: int = 0, **options: object) -> nn.Module:
    """Four attention blocks: down, middle, two up; images (n, 1, 8, 8), texts (n, 2, 8)."""
    from diffusers import UNet2DConditionModel

    chosen = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    } | options
    torch.manual_seed(seed)
    return UNet2DConditionModel(**chosen).eval()


def stable_diffusion_unet() -> nn.Module:
    """The blocks of Stable Diffusion 1.5, four channels wide."""
    return small_unet(
        layers_per_block=2,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        norm_num_groups=2,
        cross_attention_dim=4,
        attention_head_dim=2,
    )


def unet_inputs(n: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, steps and texts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    steps = torch.randint(0, 50, (n,), generator=generator)
    return x, steps, torch.randn(n, 2, 8, generator=generator)


class Block(nn.Module):
    """x + tanh(W x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """An input layer, blocks in a row and a norm: (n, 4) -> (n, 4)."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
