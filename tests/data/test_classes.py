"""Names of classes, and finding a class by what a person calls it."""

import pytest

from repulsor_jax.data import classes

SYNSETS = tuple(f"n{k:08d}" for k in range(1000))


def test_imagenets_names_are_in_the_order_of_its_labels():
    names = classes.imagenet_names()
    assert len(names) == len(set(names)) == 1000
    # As DiT's and SiT's scripts call the labels that they draw.
    expected = {
        0: "tench",
        207: "golden retriever",
        360: "otter",
        387: "lesser panda",
        974: "geyser",
    }
    assert {k: names[k] for k in expected} == expected
    assert classes.readable(SYNSETS) == names
    assert classes.readable(("cat", "dog")) == ("cat", "dog")


def test_classes_by_number_and_by_name():
    wanted = (360, "Golden Retriever", "n00000003", "5")
    assert classes.find(SYNSETS, wanted) == (360, 207, 3, 5)
    digits = tuple("9876543210")
    assert classes.find(digits, ("9", 9)) == (0, 9)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (1000, "found 1000, expected a number from 0 to 999, or a name, as 'tench'$"),
        ("retriever", "of that name in part: 205 'flat-coated retriever', 206 .*207 'golden"),
        (-1, "found -1, expected a number"),
    ],
)
def test_what_is_not_there(wanted, message):
    with pytest.raises(ValueError, match=message):
        classes.find(SYNSETS, (wanted,))


def test_several_classes_of_a_name():
    with pytest.raises(ValueError, match=r"several classes are called: give one of \[0, 2\]"):
        classes.find(("crane", "bird", "Crane"), ("crane",))
