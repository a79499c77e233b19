"""Accelerators that this machine lacks, as their compilers describe them."""

import importlib.util
import re
from dataclasses import dataclass

import jax

from gpt.errors import UserError, require

GB, TERA = 10**9, 10**12
SLICE = r"\d+(x\d+)+"  # shape of a TPU slice
GPUS = r"([1-9]\d*x)?[1-8]"  # nodes, and GPUs in each
COMPILERS = {"tpu": ["libtpu"], "cuda": ["jax_cuda13_plugin", "jax_cuda12_plugin"]}
JAX_TAKES = 0.75  # of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


@dataclass(frozen=True)
class Chip:
    """An accelerator's data sheet.

    `flops_per_second`: dense bfloat16 matrix products. `link_bytes_per_second`: what it can send
    within its slice or node while receiving as much; `network_bytes_per_second`: to other nodes.
    `target`: other properties that XLA needs of a GPU.
    """

    memory_bytes: float
    bytes_per_second: float
    flops_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float = 0
    target: str = ""

    @property
    def is_gpu(self) -> bool:
        return self.target != ""

    @property
    def usable_bytes(self) -> float:
        """The memory that JAX may take."""
        return self.memory_bytes * (JAX_TAKES if self.is_gpu else 1)


# What XLA needs to know about any of these GPUs, and what differs between generations.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  device_memory_size: {memory_bytes:.0f} memory_bandwidth: {bytes_per_second:.0f}
  {target}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""
AMPERE = (
    "cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 "
    "l2_cache_size: 41943040 shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912"
)
HOPPER = (
    "cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 "
    "l2_cache_size: 52428800 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448"
)
BLACKWELL = (
    "cuda_compute_capability { major: 10 } core_count: 148 fpus_per_core: 128 clock_rate_ghz: 1.96 "
    "l2_cache_size: 132644864 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448"
)

# GPUs: NVIDIA's data sheets for the SXM version and the DGX with eight of them (A100 80 GB). TPUs:
# docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e; a ring uses two of a chip's links, one in each
# direction, which together carry what one link does in both directions.
CHIPS = {
    "a100": Chip(80 * GB, 2039 * GB, 312 * TERA, 300 * GB, 25 * GB, AMPERE),
    "h100": Chip(80 * GB, 3350 * GB, 989 * TERA, 450 * GB, 50 * GB, HOPPER),
    "h200": Chip(141 * GB, 4800 * GB, 989 * TERA, 450 * GB, 50 * GB, HOPPER),
    "b200": Chip(180 * GB, 8000 * GB, 2250 * TERA, 900 * GB, 50 * GB, BLACKWELL),
    "v5e": Chip(16 * GB, 819 * GB, 197 * TERA, 100 * GB),
    "v5p": Chip(95 * GB, 2765 * GB, 459 * TERA, 200 * GB),
    "v6e": Chip(32 * GB, 1640 * GB, 918 * TERA, 200 * GB),
}


def topology_devices(topology: str) -> tuple[list, Chip]:
    """The devices of a TPU slice such as v5e:16x16, or of GPU nodes such as h100:8 or h100:4x8, and
    their chip.

    Raises UserError if the chip or shape is unknown, or its compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    chip = CHIPS.get(kind)
    form = GPUS if chip and chip.is_gpu else SLICE
    require(
        chip is not None and re.fullmatch(form, shape) is not None,
        f"--topology {topology}: expected a chip ({', '.join(CHIPS)}) and how many: the shape of a "
        "slice of TPUs as in v5e:16x16, up to 8 GPUs of a node as in h100:8, or nodes x GPUs as in "
        "h100:4x8",
    )
    extra = "cuda" if chip.is_gpu else "tpu"
    require(
        any(importlib.util.find_spec(module) for module in COMPILERS[extra]),
        f"--topology {topology} needs its compiler, preferably in an environment of its own: "
        f"pip install -e '.[{extra}]'",
    )
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        if chip.is_gpu:
            nodes, _, gpus = shape.rpartition("x")
            target = TARGET.format(name=kind.upper(), **vars(chip))
            slices = f"1x{nodes or 1}x{gpus}"
            found = topologies.get_topology_desc(
                "", "cuda", target_config=target, topology=slices
            ).devices
        else:
            found = topologies.get_topology_desc(topology, "tpu").devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology {topology}: its compiler does not accept it: {reason}"
        ) from None
    return list(found), chip
