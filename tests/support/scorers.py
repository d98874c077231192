"""Small random checkpoints of the models that score, in the layouts that are published."""

from pathlib import Path

import torch
from torch import nn
from transformers import BitImageProcessorPil, CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Config, Dinov2Model

from support.tiny_models import TEXT_TOKENS, build_tokenizer

CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
SHAPES = {
    "alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)},
    "vgg": {
        0: (64, 3, 3),
        2: (64, 64, 3),
        5: (128, 64, 3),
        7: (128, 128, 3),
        10: (256, 128, 3),
        12: (256, 256, 3),
        14: (256, 256, 3),
        17: (512, 256, 3),
        19: (512, 512, 3),
        21: (512, 512, 3),
        24: (512, 512, 3),
        26: (512, 512, 3),
        28: (512, 512, 3),
    },
}
"""torchvision's layers: number to output channels, input channels, kernel size."""
FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}

AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"


def save_clip(folder: Path, seed: int = 1) -> Path:
    """A CLIP with embeddings of 8 numbers, of images of 16 pixels."""
    tokenizer = build_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**shape, **special, "vocab_size": len(tokenizer), "max_position_embeddings": TEXT_TOKENS}
    config = CLIPConfig(text_config=text, vision_config={**shape, "image_size": 16, "patch_size": 8}, projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A DINOv2 of images of 28 pixels, four patches."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return folder


def build_head(width: int = 8) -> nn.Sequential:
    """The layers of LAION's predictor for an embedding of ``width`` numbers: linear ones, and dropouts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        ).eval()  # fmt: skip


def save_head(folder: Path, width: int = 8) -> Path:
    """The file of an aesthetic head."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"layers.{name}": tensor for name, tensor in build_head(width).state_dict().items()}
    torch.save(state, folder / AESTHETIC_FILE)
    return folder / AESTHETIC_FILE


def save_lpips(folder: Path) -> Path:
    """Random weights in the layout and under the names of torchvision and the lpips package."""
    generator = torch.Generator().manual_seed(0)
    for network, layers in SHAPES.items():
        state = {"classifier.1.weight": torch.zeros(2, 2)}
        for number, (outputs, inputs, kernel) in layers.items():
            spread = (2 / (inputs * kernel * kernel)) ** 0.5
            state[f"features.{number}.weight"] = spread * torch.randn(
                outputs, inputs, kernel, kernel, generator=generator
            )
            state[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
        torch.save(state, folder / FILES[network])
        heads = {
            f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator)
            for n, c in enumerate(CHANNELS[network])
        }
        torch.save(heads, folder / f"{network}.pth")
    return folder
