"""Devices that are not here: virtual ones of this CPU, and chips known only to their compiler."""

import importlib.util
import re

import jax

from gpt.errors import UserError, require

GB = 10**9


# docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e, "Key chip specifications".
MEMORY_BYTES = {"v5e": 16 * GB, "v5p": 95 * GB, "v6e": 32 * GB}


def topology_devices(topology: str) -> tuple[list, int]:
    """The devices of a TPU slice such as v5e:16x16, and the bytes of memory of each.

    UserError if there is no such slice or no compiler for it.
    """
    kind = topology.partition(":")[0]
    require(
        kind in MEMORY_BYTES and re.fullmatch(r"\w+:\d+(x\d+)+", topology) is not None,
        f"--topology {topology}: expected a chip ({', '.join(MEMORY_BYTES)}) and the shape of a "
        "slice, as in v5e:16x16",
    )
    require(
        importlib.util.find_spec("libtpu") is not None,
        "--topology needs the TPU compiler, preferably in an environment of its own: "
        "pip install libtpu (or the extra of this project: pip install -e '.[tpu]')",
    )
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(topology, "tpu").devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology {topology}: the TPU compiler does not accept it: {reason}"
        ) from None
    return list(found), MEMORY_BYTES[kind]


def virtual_devices(n: int) -> list:
    """`n` devices of this CPU. Call it before JAX has created any device."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n)
    return jax.devices()
