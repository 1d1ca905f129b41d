from repulsor_jax.files.checksums import file_sha256, values_sha256


def test_a_file_has_the_sum_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_values_have_one_sum_in_any_order_of_keys():
    assert values_sha256({"a": 1, "b": [2]}) == values_sha256({"b": [2], "a": 1})
    assert values_sha256({"a": 1}) != values_sha256({"a": 2})
