from repulsor_jax.runtime import chips


def test_devices_are_found_by_their_kind():
    assert chips.find("TPU v5 lite").name == "v5e"
    assert chips.find("TPU v5").name == "v5p"
    assert chips.find("NVIDIA H100 80GB HBM3").peak_flops == 989e12
    assert chips.find("cpu") is None
    kinds = [kind for chip in chips.CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_figures_agree_with_the_published_figures_of_whole_pods():
    """A second set of figures from the same pages: a slip of unit or of factor would show."""
    chip = {chip.name: chip for chip in chips.CHIPS}
    for name, size, peak in (("v5e", 256, 50.63e15), ("v6e", 256, 234.9e15), ("v4", 4096, 1.1e18)):
        assert abs(size * chip[name].peak_flops / peak - 1) < 0.03
    # The all-reduce rate of a pod, over the links of each chip.
    for name, size, links, rate in (
        ("v5e", 256, 4, 51.2e12),
        ("v6e", 256, 4, 102.4e12),
        ("v4", 4096, 6, 1.1e15),
    ):
        assert abs(size * links * chip[name].link_bytes_per_second / rate - 1) < 0.03
