"""What a run would take of devices that are not here: compiled for them, counted, not run."""

from gpt.errors import positive, require, require_file_path


def wants_absent_devices(args) -> bool:
    """Whether `args`, the flags of train.py, ask for a plan for devices that are not here.

    UserError if they ask for one in a way that contradicts itself.
    """
    if args.devices is None and args.topology is None:
        require(args.json is None, "--json writes a plan: add --devices or --topology")
        return False
    require(
        args.devices is None or args.topology is None,
        "--devices and --topology exclude each other: choose virtual devices of this CPU, or "
        "accelerators",
    )
    if args.devices is not None:
        positive("devices", args.devices)
    require(
        args.dry_run,
        "--devices and --topology plan for devices that are not here: add --dry-run",
    )
    if args.json is not None:
        require_file_path("--json", args.json)
    for flag, value in (("--data", args.data), ("--init-from", args.init_from)):
        require(not value, f"a plan for devices that are not here reads no text: drop {flag}")
    return True
