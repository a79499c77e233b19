"""What vendors state for their devices: beside what was measured, never in place of it.

Dense bfloat16 FLOP/s and memory bytes/s, from NVIDIA's and Google Cloud's data sheets of 2025.
"""

STATED = {
    "H200": (989e12, 4.8e12),
    "H100 80GB HBM3": (989e12, 3.35e12),
    "H100 PCIe": (756e12, 2.0e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100-SXM4-40GB": (312e12, 1.555e12),
    "L4": (121e12, 0.3e12),
    "TPU v4": (275e12, 1.228e12),
    "TPU v5 lite": (197e12, 0.819e12),
    "TPU v5p": (459e12, 2.765e12),
    "TPU v6 lite": (918e12, 1.64e12),
}


def find(device_kind: str) -> tuple[float, float] | None:
    """(bfloat16 FLOP/s, bytes/s) as the vendor states them; None where we do not know."""
    names = [name for name in STATED if device_kind.endswith(name)]
    return STATED[names[0]] if names else None


def describe(device_kind: str) -> str:
    """The vendor's figures in words."""
    stated = find(device_kind)
    if stated is None:
        return "the vendor's peak: unknown"
    flops, rate = stated
    return f"the vendor states {flops / 1e12:,.0f} TFLOP/s in bfloat16 and {rate / 1e12:,.2f} TB/s"
