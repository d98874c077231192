"""LPIPS: perceptual distance between images by the feature maps of a network.

The computation is that of "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (Zhang et al., CVPR
2018, arXiv 1801.03924, eq. 1), as in the ``lpips`` package 0.1.4: feature maps are normalised to unit length over their
channels, and their squared difference is weighted per channel, averaged over space and summed over layers.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn

from vcf_batch import storage
from vcf_batch.errors import ModelError
from vcf_batch.models.loading import load_errors

Features = Callable[[Tensor], Sequence[Tensor]]
"""Function from images ``[B, 3, H, W]`` in [-1, 1] to feature maps, each ``[B, C, h, w]``."""

_EPS = 1e-10


class PerceptualDistance:
    """Weighted squared difference of unit-normalised feature maps.

    Args:
        features: the network.
        weights: for each feature map the weights of its channels, ``[C]``; None weights every channel ``1 / C``.
        device: the device of ``features``.
    """

    def __init__(
        self, features: Features, weights: Sequence[Tensor] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.features = features
        self.weights = None if weights is None else [weight.to(device, torch.float32) for weight in weights]
        self.device = torch.device(device)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The distances of :meth:`compare`, float32 ``[B]``."""
        return self.compare(a, b)[0]

    @torch.inference_mode()
    def compare(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Compare each image of ``a`` with its counterpart in ``b``: distance and channel statistics in one pass.

        Nothing is resized here: :class:`vcf_batch.metrics.scorer.Scorer` squashes references to the output's size.

        Args:
            a, b: float ``[B, 3, H, W]`` in [-1, 1], of equal sizes.

        Returns:
            Distances (0 for equal images, larger for less similar ones) and style similarities (1 for equal channel
            statistics, nearer 0 for less similar ones), both float32 ``[B]`` on the network's device.

        Raises:
            ValueError: the shapes differ, are not images, or are too small for the network.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
            raise ValueError(f"images must be two tensors of one shape [B, 3, H, W], not {[*a.shape]} and {[*b.shape]}")
        maps_a, maps_b = self.features(a.to(self.device)), self.features(b.to(self.device))
        weights = self.weights or [torch.ones(m.shape[1], device=self.device) / m.shape[1] for m in maps_a]
        total, similar = torch.zeros(2, len(a), device=self.device)
        for map_a, map_b, weight in zip(maps_a, maps_b, weights, strict=True):
            difference = (_unit(map_a) - _unit(map_b)).square()
            total += (difference * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
            similar += _style_similarity(map_a, map_b) / len(maps_a)
        return total, similar


class LPIPS(PerceptualDistance):
    """LPIPS with the published weights, version 0.1."""

    @classmethod
    def from_pretrained(cls, network: str, source: str, device: torch.device | str = "cpu") -> "LPIPS":
        """Load a backbone and its linear heads.

        Args:
            network: ``alex`` (for images of 31 pixels a side and more) or ``vgg`` (16 pixels and more).
            source: folder or URL with the official files (see :func:`weight_files`).
            device: device for the network; the network always runs in float32.

        Raises:
            ModelError: a file is missing, unsafe to load or of another layout.
            StorageError: the storage failed.
        """
        backbone_url, heads_url = weight_files(network, source)
        backbone = Backbone(network)
        layers = {name: t for name, t in _load(backbone_url).items() if name.startswith("features.")}
        try:
            backbone.load_state_dict(layers)
        except RuntimeError as error:
            raise ModelError(f"{backbone_url} is not torchvision's {_NETWORKS[network].backbone}: {error}") from error
        heads = _load(heads_url)
        weights = []
        for number, channels in enumerate(_NETWORKS[network].channels):
            weight = heads.get(f"lin{number}.model.1.weight")
            if weight is None or weight.shape != (1, channels, 1, 1) or not (weight >= 0).all():
                raise ModelError(
                    f"{heads_url} does not hold the lpips package's heads for {network!r}: "
                    f"lin{number}.model.1.weight must be [1, {channels}, 1, 1] and not negative"
                )
            weights.append(weight.flatten())
        return cls(backbone.to(device).eval().requires_grad_(False), weights, device)


class Backbone(nn.Module):
    """Convolutions of AlexNet or VGG16 in torchvision's layout (``features.0.weight``...), tapped at five ReLUs.

    Args:
        network: ``alex`` or ``vgg``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: str) -> None:
        super().__init__()
        self.network = _NETWORKS[network]
        self.features = self.network.build()
        # ImageNet's mean and standard deviation, converted for images in [-1, 1].
        for name, values in {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps at the five taps.

        Args:
            images: ``[B, 3, H, W]`` in [-1, 1].

        Raises:
            ValueError: the images are too small for the pooling layers.
        """
        if min(images.shape[2:]) < self.network.smallest:
            raise ValueError(
                f"images of {images.shape[3]} x {images.shape[2]} pixels are too small for {self.network.backbone}; "
                f"it needs {self.network.smallest} along each side"
            )
        x, maps = (images.float() - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.network.taps:
                maps.append(x)
        return maps


def weight_files(network: str, source: str) -> tuple[str, str]:
    """URLs of backbone and linear heads in a folder of official files.

    The backbone is torchvision's (``alexnet-owt-7be5be79.pth``, ``vgg16-397923af.pth``), the heads are those of the
    ``lpips`` package (``lpips/weights/v0.1/alex.pth``, ``vgg.pth``); either may be ``.safetensors`` instead. A web
    address cannot be listed, so its files must have exactly these names.

    Raises:
        ModelError: backbone or heads are missing.
    """
    wanted = {
        _NETWORKS[network].official: rf"{_NETWORKS[network].backbone}(-[\w-]+)?\.(pth|safetensors)",
        f"{network}.pth": rf"{network}\.(pth|safetensors)",
    }
    if source.startswith(("http://", "https://")):
        return storage.join(source, _NETWORKS[network].official), storage.join(source, f"{network}.pth")
    there = sorted(storage.list_files(source))
    found = {official: [name for name in there if re.fullmatch(p, name)] for official, p in wanted.items()}
    for official, names in found.items():
        if not names:
            raise ModelError(
                f"{source} holds no {official}, which LPIPS over {network!r} needs; download it from "
                "torchvision (backbone) or the lpips package (heads), or turn the score off with --lpips none"
            )
    backbone, heads = (storage.join(source, names[0]) for names in found.values())
    return backbone, heads


@dataclass(frozen=True)
class _Network:
    backbone: str
    official: str
    build: Callable[[], nn.Sequential]
    taps: tuple[int, ...]
    channels: tuple[int, ...]
    smallest: int


def _alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
    )


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for block, (outputs, convolutions) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if block:
            layers.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = outputs
    return nn.Sequential(*layers)


_NETWORKS = {
    "alex": _Network(
        backbone="alexnet",
        official="alexnet-owt-7be5be79.pth",
        build=_alexnet,
        taps=(1, 4, 7, 9, 11),
        channels=(64, 192, 384, 256, 256),
        smallest=31,
    ),
    "vgg": _Network(
        backbone="vgg16",
        official="vgg16-397923af.pth",
        build=_vgg16,
        taps=(3, 8, 15, 22, 29),
        channels=(64, 128, 256, 512, 512),
        smallest=16,
    ),
}


def _unit(maps: Tensor) -> Tensor:
    """Feature maps ``[B, C, h, w]`` with the channels of every pixel scaled to length 1, in float32."""
    maps = maps.float()
    return maps / (maps.square().sum(dim=1, keepdim=True).sqrt() + _EPS)


def _style_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of the channels' means and deviations over the image, ``[B]``, 0 to 1 (docs/quality.md).

    It follows the palette, and hardly the style: :func:`vcf_batch.metrics.texture.texture_similarity` does that.
    """
    x, y = _statistics(a), _statistics(b)
    apart, size = (x - y).abs().sum(dim=1), (x.abs() + y.abs()).sum(dim=1)
    return 1 - apart / (size + _EPS)


def _statistics(maps: Tensor) -> Tensor:
    """Style of feature maps: mean and deviation of each channel over the image, ``[B, C, h, w]`` to ``[B, 2 C]``."""
    deviation, mean = torch.std_mean(maps.float(), dim=(2, 3), correction=0)
    return torch.cat([mean, deviation], dim=1)


def _load(url: str) -> Mapping[str, Tensor]:
    """Load a state dict from ``.safetensors``, or from ``.pth`` without running code in it."""
    with load_errors(f"{url}, which LPIPS needs", ". Check --lpips-weights, or turn the score off with --lpips none"):
        data = storage.read_bytes(url)
    try:
        if url.endswith(".safetensors"):
            return safetensors.torch.load(data)
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise TypeError("it is not a state dict")
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{url} does not hold weights that are safe to load: {error}") from error
    return tensors
