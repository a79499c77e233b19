"""Devices that are not here: virtual ones of this CPU, and TPUs known to their compiler alone.

The figures of the chips are their vendor's, not measured.
"""

import importlib.util
import re
from dataclasses import dataclass

import jax

from gpt.errors import UserError, require

GB = 10**9
INSTALL = "pip install libtpu (or this project's extra: pip install -e '.[tpu]')"


@dataclass(frozen=True)
class Chip:
    """What a vendor says of a chip. Bytes, FLOP/s in bfloat16, bytes/s."""

    memory: int
    flops: float
    memory_rate: float
    links_rate: float
    """Between chips, all links together, both directions."""
    links: int

    @property
    def ring_rate(self) -> float:
        """Bytes/s that leave a chip in a ring, which takes two of its links, one each way."""
        return self.links_rate / 2 / self.links * 2


# docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e, "Key chip specifications".
CHIPS = {
    "v5e": Chip(16 * GB, 197e12, 819e9, 400e9, links=4),
    "v5p": Chip(95 * GB, 459e12, 2765e9, 1200e9, links=6),
    "v6e": Chip(32 * GB, 918e12, 1600e9, 800e9, links=4),
}


def virtual_devices(n: int) -> list:
    """`n` devices of this CPU; to be called before JAX has made any."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n)
    return jax.devices()


def topology_devices(name: str) -> tuple[list, Chip]:
    """The devices of a TPU slice as its compiler knows them, and their chip: `v5e:16x16`.

    UserError if there is no such slice, or no compiler.
    """
    kind = name.partition(":")[0]
    require(
        kind in CHIPS and re.fullmatch(r"\w+:\d+(x\d+)+", name) is not None,
        f"--topology {name}: expected a chip ({', '.join(CHIPS)}) and its slice, as v5e:16x16",
    )
    require(
        importlib.util.find_spec("libtpu") is not None,
        f"--topology needs the TPU compiler, in an environment of its own: {INSTALL}",
    )
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        devices = topologies.get_topology_desc(name, "tpu").devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {name}: the TPU compiler refuses it: {reason}") from None
    return list(devices), CHIPS[kind]
