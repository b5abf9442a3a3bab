"""What must come of probes.cu: the stand-in for the CUDA runtime, and programmatic launches through it."""

import ctypes as C
import itertools
import re

import numpy as np
from device import Trouble

ELEMENTS = 192  # of a link: three blocks of 64
BUGS = ("correct", "waits too late", "never waits", "writes before the wait")
FOUND = "what the launch before may be using, before griddepcontrol.wait"
INVALID_VALUE, INVALID_CONFIGURATION, INVALID_FUNCTION = 1, 9, 98  # cudaError_t
PRIORITY = 8  # a cudaLaunchAttributeID that is not known


def expect(got, wanted, what):
    if got != wanted:
        raise Trouble(f"{what} is {got}, not {wanted}")


def expect_trouble(message, function):
    try:
        function()
    except Trouble as trouble:
        if re.search(message, str(trouble)):
            return
        raise
    raise Trouble(f"nobody said {message!r}")


def chain(bug, programmatic, early, warps):
    def check(device):
        device.free()
        device.configure(early=early, warps=warps, race=1)
        given = device.put(np.arange(ELEMENTS, dtype=np.float32))
        outs = [device.out(ELEMENTS, np.float32) for _ in range(3)]

        def run():
            device.call("probe_chain", given, *outs, C.c_int(BUGS.index(bug)), C.c_int(programmatic))
            device.flush()

        if bug != "correct" and programmatic:
            expect_trouble(FOUND, run)
        else:
            run()
            expect(outs[-1].tolist(), (given + 3).tolist(), "the end of a chain")

    return f"chain {bug} programmatic={programmatic} early={early} warps={warps}", check


def shared_memory(device):
    device.free()
    device.configure()
    given, out = device.put(np.arange(64, dtype=np.float32)), device.out(64, np.float32)

    def run(threads=64, shared=256, allowed=0):
        device.call("probe_reverse", given, out, C.c_int64(threads), C.c_int64(shared), C.c_int64(allowed))

    run()
    expect(out.tolist(), given[::-1].tolist(), "the block in reverse")
    expect_trouble("outside of shared memory", lambda: run(shared=128))
    expect_trouble(f"returned {INVALID_VALUE}", lambda: run(shared=64 * 1024))
    run(shared=64 * 1024, allowed=64 * 1024)
    expect_trouble(f"returned {INVALID_VALUE}", lambda: run(allowed=100 * 1024))
    expect_trouble(f"returned {INVALID_CONFIGURATION}", lambda: run(threads=2048))
    expect_trouble(f"returned {INVALID_CONFIGURATION}", lambda: run(threads=0))
    expect_trouble(f"returned {INVALID_FUNCTION}", lambda: device.call("probe_unregistered", given))


def questions(architecture):
    def check(device):
        expect(device.library.probe_capability(), architecture, "the compute capability")
        expect(device.library.probe_driver_is_as_new_as_the_runtime(), 1, "whether the driver is new enough")
        expect(device.library.probe_attribute(C.c_int(PRIORITY)), INVALID_VALUE, "the answer to an unknown attribute")

    return "questions to the runtime", check


def probe_checks(architecture):
    yield "shared memory", shared_memory
    yield questions(architecture)
    for bug, programmatic, early, warps in itertools.product(BUGS, (0, 1), (0, 1), range(3)):
        # Without the attribute, launches follow each other and nothing is a bug but what spoils the result.
        if programmatic or bug != "writes before the wait":
            yield chain(bug, programmatic, early, warps)
