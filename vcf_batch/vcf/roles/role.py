"""Roles: in which layers and steps a reference acts, and with which part of its tokens; and the layers of a UNet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vcf_batch.config.limits import ROLES
from vcf_batch.errors import UsageError

ROLE_FILE = "roles.safetensors"
"""File beside an aligner's weights with the projections of its tokens."""


@dataclass(frozen=True)
class Role:
    """What a reference may decide on.

    A role says the same of every UNet: its layers are grouped by their resolution, and its steps by their share of the
    schedule.
    """

    name: str = "all"
    coarse: float = 1.0
    """Weight of the image tokens in the coarse half of the UNet's resolutions, which decides on the composition. 0
    hides them there."""
    fine: float = 1.0
    """Weight in the fine half of the resolutions, which decides on colours and texture."""
    lo: float = 0.0
    """Start of the part of the schedule in which the reference acts, as a fraction; 1 is pure noise."""
    hi: float = 1.0
    projected: bool = False
    """Whether the tokens are projected, by the projection that is stored for the role."""

    def weight(self, layers: "Layers") -> float:
        """Weight of the image tokens in layers of one resolution."""
        return self.coarse if layers.is_coarse else self.fine

    def acts_at(self, time: float) -> bool:
        """Whether the reference acts at ``time`` (t / 999)."""
        return self.lo <= time <= self.hi


ALL = Role()
"""The role without any limit."""

_ROLES = (
    ALL,
    Role("style", coarse=3.0, fine=3.0, projected=True),
    Role("palette", coarse=0.0, fine=3.0, projected=True),
    Role("layout", fine=0.0, lo=0.7),
)

BY_NAME: Mapping[str, Role] = {role.name: role for role in _ROLES}
"""The role of each of :data:`vcf_batch.config.limits.ROLES`."""
assert (*BY_NAME,) == ROLES


ADAPTED_STYLE = Role("style", coarse=0.0)
"""The role ``style`` of an IP-Adapter. Its tokens have no projection, and the fine half decides on colours, too."""


def role_of(name: Any, adapted: bool = False) -> Role:
    """The role with a name.

    Args:
        name: one of :data:`vcf_batch.config.limits.ROLES`.
        adapted: whether the reference's tokens are those of an IP-Adapter.

    Raises:
        UsageError: there is none.
    """
    if name not in ROLES:
        raise UsageError(f"the role of a reference is {name!r}; it must be one of {', '.join(ROLES)}")
    return ADAPTED_STYLE if adapted and name == ADAPTED_STYLE.name else BY_NAME[name]


@dataclass(frozen=True)
class Layers:
    """The cross-attention layers of a UNet that have one resolution."""

    height: int
    width: int
    """Size of the grid of queries."""
    is_coarse: bool
    """Whether it is one of the coarse half of the resolutions."""

    @property
    def queries(self) -> int:
        """Number of queries, which tells the resolution in a call."""
        return self.height * self.width


_MIDDLE = "UNetMidBlock2DCrossAttn"
"""Middle block of a configuration that names none, as that of Stable Diffusion 1.5."""


def layers_of(unet: Mapping[str, Any], height: int, width: int) -> list[Layers]:
    """The resolutions at which a UNet has cross-attention, the finest one first.

    The coarse half has the larger part of an odd number of resolutions.

    Args:
        unet: configuration of a ``UNet2DConditionModel``.
        height, width: size of the latents.

    Raises:
        UsageError: there is one resolution alone, so that there is nothing to choose between.
    """
    blocks: Sequence[str] = unet["down_block_types"]
    middle = unet.get("mid_block_type", _MIDDLE) or ""
    found = []
    for number, block in enumerate(blocks):
        is_last = number == len(blocks) - 1
        if "CrossAttn" in block or (is_last and "CrossAttn" in middle):
            found.append((height, width))
        if not is_last:
            height, width = -(-height // 2), -(-width // 2)
    if len(found) < 2:
        raise UsageError(
            f"the UNet has cross-attention at {len(found)} resolution, and roles and masks need two or more: leave "
            "them out with this model"
        )
    return [Layers(*size, number >= len(found) // 2) for number, size in enumerate(found)]
