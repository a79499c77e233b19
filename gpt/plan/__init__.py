"""What a run would take of devices that are not here: compiled for them, counted, predicted.

It knows training and sampling; nothing is allocated, and nothing here runs a model.
"""

from gpt.errors import positive, require


def require_asked(command) -> bool:
    """Whether a command line asks for such a plan; UserError if it does so in a way that is none.

    `command`: has the flags of train.py as fields.
    """
    asked = command.devices is not None or command.topology is not None
    if not asked:
        return False
    positive("devices", 1 if command.devices is None else command.devices)
    require(
        command.devices is None or command.topology is None,
        "--devices and --topology exclude each other: virtual devices of this CPU, or a TPU slice",
    )
    require(
        command.dry_run,
        "--devices and --topology plan for devices that are not here: give --dry-run too",
    )
    for flag, given in (("--data", command.data), ("--init-from", command.init_from)):
        require(not given, f"a plan for devices that are not here reads no text: drop {flag}")
    return True
