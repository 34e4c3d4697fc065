"""What else came with sm_90: proxy fences, clusters, and hints."""

from __future__ import annotations

import numpy as np

from tests.emulated.machine.instructions import Decoder, Run, family
from tests.emulated.machine.machine import Warp
from tests.emulated.machine.memory import Array, Fault


@family("fence.proxy.async")
def _fence(d: Decoder) -> Run:
    """9.7.13.4: between ordinary accesses and asynchronous operations; of global memory, nothing depends on it here."""
    d.allow("proxy", "async", "async::generic", "shared::cta", "shared::cluster", "global")
    if "global" in d.has:
        return lambda warp, mask: None
    return lambda warp, mask: warp.cta.clocks.fence(warp.number)


@family("fence.proxy", "membar.proxy")
def _unknown_fence(d: Decoder) -> Run:
    raise d.error("not supported")


@family("fence.mbarrier_init")
def _initialised(d: Decoder) -> Run:
    """9.7.13.4: accesses are seen at once, here."""
    d.allow("mbarrier_init", "release", "cluster")
    return lambda warp, mask: None


@family("setmaxnreg")
def _registers(d: Decoder) -> Run:
    """9.7.19.5: a hint; registers are not counted."""
    d.allow("inc", "dec", "sync", "aligned", "u32")
    if int(str(d.operands[0])) % 8 or not 24 <= int(str(d.operands[0])) <= 256:
        raise d.error("so many registers")
    return lambda warp, mask: warp.converged(mask)


@family("griddepcontrol")
def _dependents(d: Decoder) -> Run:
    """9.7.13.14: of grids, there is one at a time."""
    return lambda warp, mask: None


# Clusters of one CTA.


@family("barrier.cluster.arrive")
def _arrive(d: Decoder) -> Run:
    """9.7.13.3: by all threads of the cluster."""
    d.allow("cluster", "arrive", "release", "relaxed", "aligned")

    def run(warp: Warp, mask: Array) -> None:
        warp.converged(mask)
        cta = warp.cta
        if warp.cluster_phase > cta.cluster.count:
            raise Fault("a second arrival at the cluster's barrier without a wait", int(mask.argmax()))
        warp.cluster_phase += 1
        left = cta.clocks.leave(warp.number)
        if "relaxed" not in d.has:
            np.maximum(cta.cluster.seen, left, out=cta.cluster.seen)
        cta.cluster.come += 1
        cta.release_cluster()

    return run


@family("barrier.cluster.wait")
def _wait(d: Decoder) -> Run:
    d.allow("cluster", "wait", "acquire", "aligned")

    def run(warp: Warp, mask: Array) -> None:
        warp.converged(mask)
        if warp.cluster_phase > warp.cta.cluster.count:
            warp.block()
        else:
            warp.cta.clocks.join(warp.number, warp.cta.cluster.seen)

    return run


@family("mapa")
def _map(d: Decoder) -> Run:
    """9.7.9.24: an address in the shared memory of a CTA of the cluster."""
    d.allow("shared::cluster", "u32", "u64")
    kind = d.types[-1]
    address, rank, write = d.read(d.operands[1], kind), d.read(d.operands[2], "u32"), d.write(d.operands[0], kind)

    def run(warp: Warp, mask: Array) -> None:
        if rank(warp)[mask].any():
            raise Fault("a CTA that is not in the cluster", int(mask.argmax()))
        write(warp, mask, address(warp))

    return run
