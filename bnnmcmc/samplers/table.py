"""All kernels by name: the command line's choice, and the subject of one contract test."""

from collections.abc import Callable

from bnnmcmc.errors import InputError
from bnnmcmc.samplers.hmc import hmc
from bnnmcmc.samplers.kernel import Kernel
from bnnmcmc.samplers.mams import mams
from bnnmcmc.samplers.mclmc import mclmc
from bnnmcmc.samplers.nuts import nuts

KERNELS: dict[str, Callable[..., Kernel]] = {
    "mclmc": mclmc,
    "mams": mams,
    "nuts": nuts,
    "hmc": hmc,
}


def kernel_named(kernel: str | Kernel) -> Kernel:
    """Return the kernel of this name with its default options, or the given kernel itself."""
    if isinstance(kernel, Kernel):
        return kernel
    if kernel not in KERNELS:
        raise InputError(f"kernel: found {kernel!r}, expected one of {', '.join(KERNELS)}")
    return KERNELS[kernel]()
