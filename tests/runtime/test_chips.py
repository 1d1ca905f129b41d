from repulsor_jax.runtime import chips


def test_devices_are_found_by_what_jax_calls_them():
    assert chips.find("TPU v5 lite").name == "v5e"
    assert chips.find("TPU v5").name == "v5p"
    assert chips.find("NVIDIA H100 80GB HBM3").peak_flops == 989e12
    assert chips.find("cpu") is None
    kinds = [kind for chip in chips.CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_figures_agree_with_what_is_published_of_whole_pods():
    """A second set of figures from the same pages: a slip of unit or of factor would show."""
    peak = {chip.name: chip.peak_flops for chip in chips.CHIPS}
    assert abs(256 * peak["v5e"] / 50.63e15 - 1) < 0.01  # v5e pod, bf16
    assert abs(256 * peak["v6e"] / 234.9e15 - 1) < 0.01
    assert abs(4096 * peak["v4"] / 1.1e18 - 1) < 0.03
    links = {chip.name: chip.links * (chip.link_bytes_per_second or 0) for chip in chips.CHIPS}
    assert abs(256 * links["v5e"] / 51.2e12 - 1) < 0.01  # all-reduce rate of a pod
    assert abs(256 * links["v6e"] / 102.4e12 - 1) < 0.01
    assert abs(4096 * links["v4"] / 1.1e15 - 1) < 0.03


def test_a_chip_of_two_devices_has_half_its_peak_on_each():
    assert chips.find("TPU7x").peak_flops_per_device == 2307e12 / 2
    assert chips.find("TPU v4").peak_flops_per_device == 275e12  # both cores are one device
