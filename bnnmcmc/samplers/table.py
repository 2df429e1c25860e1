"""All kernels by name: the command line's choice, and the subject of one contract test."""

from collections.abc import Callable

from bnnmcmc.errors import InputError
from bnnmcmc.samplers.hmc import hmc
from bnnmcmc.samplers.kernel import Kernel, MinibatchKernel
from bnnmcmc.samplers.mams import mams
from bnnmcmc.samplers.mclmc import mclmc
from bnnmcmc.samplers.nuts import nuts
from bnnmcmc.samplers.sghmc import sghmc
from bnnmcmc.samplers.sgld import sgld
from bnnmcmc.samplers.smile import smile

KERNELS: dict[str, Callable[..., Kernel | MinibatchKernel]] = {
    "mclmc": mclmc,
    "mams": mams,
    "nuts": nuts,
    "hmc": hmc,
    "sgld": sgld,
    "sghmc": sghmc,
    "smile": smile,
}


def kernel_named(kernel: str | Kernel | MinibatchKernel) -> Kernel | MinibatchKernel:
    """Return the kernel of this name with its default options, or the given kernel itself."""
    if isinstance(kernel, Kernel | MinibatchKernel):
        return kernel
    if kernel not in KERNELS:
        raise InputError(f"kernel: found {kernel!r}, expected one of {', '.join(KERNELS)}")
    return KERNELS[kernel]()
