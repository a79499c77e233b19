"""Devices that are not here: virtual ones of this CPU, and chips known only to their compiler.

The figures of the chips are those of their vendor, not measured.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax

from gpt.errors import UserError, require

GB = 10**9


@dataclass(frozen=True)
class Chip:
    """A kind of chip. Bytes, FLOP/s in bfloat16, bytes/s."""

    find_devices: Callable[[str], list]
    """The devices of a topology such as v5e:16x16, from the compiler for this chip."""
    memory_bytes: int
    flops_per_second: float
    memory_bytes_per_second: float
    links_bytes_per_second: float
    """Between chips: all links together, both directions."""
    n_links: int

    @property
    def ring_bytes_per_second(self) -> float:
        """Rate at which a chip sends in a ring, which uses two of its links, one each way."""
        return self.links_bytes_per_second / 2 / self.n_links * 2


def tpu_devices(topology: str) -> list:
    """The devices of a TPU slice. UserError if there is no such slice or no compiler."""
    require(
        re.fullmatch(r"\w+:\d+(x\d+)+", topology) is not None,
        f"--topology {topology}: expected the shape of a slice after the chip, as in v5e:16x16",
    )
    require(
        importlib.util.find_spec("libtpu") is not None,
        "--topology needs the TPU compiler, preferably in an environment of its own: "
        "pip install libtpu (or the extra of this project: pip install -e '.[tpu]')",
    )
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology {topology}: the TPU compiler does not accept it: {reason}"
        ) from None


# docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e, "Key chip specifications".
CHIPS = {
    "v5e": Chip(tpu_devices, 16 * GB, 197e12, 819e9, 400e9, n_links=4),
    "v5p": Chip(tpu_devices, 95 * GB, 459e12, 2765e9, 1200e9, n_links=6),
    "v6e": Chip(tpu_devices, 32 * GB, 918e12, 1600e9, 800e9, n_links=4),
}


def topology_devices(topology: str) -> tuple[list, Chip]:
    """The devices of a topology such as v5e:16x16, and their chip."""
    kind = topology.partition(":")[0]
    require(
        kind in CHIPS,
        f"--topology {topology}: expected a chip ({', '.join(CHIPS)}) and its shape, as in "
        "v5e:16x16",
    )
    chip = CHIPS[kind]
    return chip.find_devices(topology), chip


def virtual_devices(n: int) -> list:
    """`n` devices of this CPU. Call it before JAX has created any device."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n)
    return jax.devices()
