"""Every test sees two CPU devices, whatever the machine: sharding is then always on."""

from bnnmcmc.placement import use_all_cores

use_all_cores(2)
