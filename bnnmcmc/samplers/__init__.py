"""MCMC kernels behind one protocol (see `bnnmcmc.samplers.kernel`)."""
