"""The former place of `repulsor_jax.method.repulsion`; goes with the next release."""

from repulsor_jax.method.repulsion import *  # noqa: F403
