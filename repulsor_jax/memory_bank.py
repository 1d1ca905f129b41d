"""The former place of `repulsor_jax.method.memory_bank`; goes with the next release."""

from repulsor_jax.method.memory_bank import *  # noqa: F403
